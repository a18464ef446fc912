"""Logs of a run: JSONL always, and trackers that mirror it. A tracker that fails never stops training."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from ecar.training.engine.trackers import Mirror

_CLOSE_SECONDS, _CLOSE_SECONDS_AFTER_ERROR = 120.0, 5.0  # a scheduler gives a stopped run little time


class RunLog:
    """Appends one JSON object per logged step to ``run/log.jsonl`` and mirrors numbers to trackers. A context manager:
    trackers are finished at its end.

    Args:
        run: the run's folder.
        step: the step resumed from; later lines of an interrupted run are dropped, since they will come again.
        trackers: names of ``ecar.training.engine.trackers.TRACKERS``.
        record: what the run is (``run_record``): the first line of every start, ``{"step": N, "start": {...}}``.
    """

    def __init__(
        self, run: Path, *, step: int = 0, trackers: Sequence[str] = (), record: dict[str, Any] | None = None
    ) -> None:
        self.path = run / "log.jsonl"
        records = [r for r in read_log(run) if r.get("step", 0) <= step] if step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records))
        temporary.replace(self.path)
        self.seconds_before = max((r.get("seconds", 0.0) for r in records), default=0.0)
        self._last = time.perf_counter()
        self._images: int | None = None
        self._unwritten: list[str] = []
        if record is not None:
            self._append({"step": step, "start": record})
        self.mirrors = [Mirror(kind, run, step, record or {}) for kind in dict.fromkeys(trackers)]

    def write(self, **values: Any) -> None:
        """One line; ``step`` must be among the values. Where ``images`` (seen so far) is, ``images_per_second`` since
        the line before is added, pauses for checkpoints and pictures included."""
        if "images" in values:
            now = time.perf_counter()
            if self._images is not None:
                rate = (values["images"] - self._images) / max(now - self._last, 1e-9)
                values["images_per_second"] = round(rate, 2)
            self._last, self._images = now, values["images"]
        self._append(values)
        numbers = {k: v for k, v in values.items() if k != "step" and _is_number(v)}
        for mirror in self.mirrors:
            mirror.scalars(values["step"], numbers)

    def begin(self, images: int) -> None:
        """Steps start now, ``images`` seen before: the first ``images_per_second`` counts from here."""
        self._last, self._images = time.perf_counter(), images

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture file for the trackers."""
        for mirror in self.mirrors:
            mirror.picture(name, path, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for mirror in self.mirrors:
            mirror.close(_CLOSE_SECONDS if kind is None else _CLOSE_SECONDS_AFTER_ERROR)

    def _append(self, record: dict[str, Any]) -> None:
        """Lines that a full disk does not take are kept, and written when it does."""
        self._unwritten.append(json.dumps(record) + "\n")
        size: int | None = None
        try:
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write("".join(self._unwritten).encode())
        except OSError as error:
            if len(self._unwritten) == 1:
                print(f"WARNING: {self.path}: {error}; training goes on", file=sys.stderr, flush=True)
            if size is not None:
                with suppress(OSError):  # half a line may be there
                    os.truncate(self.path, size)
        else:
            self._unwritten.clear()


@contextmanager
def by_the_way(what: str) -> Iterator[None]:
    """A picture for which the disk has no room is no reason to end a run: a warning instead of an OSError."""
    try:
        yield
    except OSError as error:
        print(f"WARNING: {what} is not written ({error}); training goes on", file=sys.stderr, flush=True)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of ``run/log.jsonl``; one torn by a crash is left out."""
    path, records = run / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"{path}: a torn line was dropped", file=sys.stderr)
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
