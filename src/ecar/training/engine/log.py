"""Logs of a run: JSONL always, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch

from ecar import __version__
from ecar.files.commit import source_commit
from ecar.training.engine.options import RunOptions


class RunLog:
    """Appends one JSON object per logged step to ``run/log.jsonl``; the same numbers, and pictures, go to
    ``run/tensorboard``. A context manager: the event file is closed at its end.

    Args:
        run: the run's folder.
        step: the step resumed from; later lines of an interrupted run are dropped, since they will come again.
        record: what the run is (``run_record``): the first line of every start, ``{"step": N, "start": {...}}``.
    """

    def __init__(self, run: Path, *, step: int = 0, record: dict[str, Any] | None = None) -> None:
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
        self._events = _event_file(run, step)
        self._mirror(lambda events: events.add_text("run", f"```\n{json.dumps(record, indent=2)}\n```", step))

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
        for name, value in values.items():
            if name != "step" and _is_number(value):
                self._mirror(lambda events, *scalar: events.add_scalar(*scalar, values["step"]), name, value)

    def begin(self, images: int) -> None:
        """Steps start now, ``images`` seen before: the first ``images_per_second`` counts from here."""
        self._last, self._images = time.perf_counter(), images

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture file for TensorBoard."""
        import numpy as np
        from PIL import Image

        self._mirror(lambda events: events.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._mirror(lambda events: events.close())

    def _mirror(self, write: Callable[..., None], *arguments: Any) -> None:
        """To TensorBoard: where its disk is full it is off from here on, and training goes on."""
        if self._events is not None:
            try:
                write(self._events, *arguments)
            except Exception as error:
                self._events = None
                print(f"WARNING: TensorBoard is off from here on ({error}); training goes on", file=sys.stderr)

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


def _event_file(run: Path, step: int) -> Any:
    """TensorBoard's writer, which hides what an interrupted run wrote after ``step``; None where it is missing, or has
    no room for its file."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, flush_secs=30)
    except ImportError:
        return None
    except Exception as error:
        print(f"WARNING: TensorBoard is off ({error}); training goes on", file=sys.stderr)
        return None


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


def run_record(
    run: RunOptions, about: dict[str, Any], world: int, rows: tuple[int, ...], accumulate: int
) -> dict[str, Any]:
    """Options as resolved, sizes, versions and machine, for a log.

    Args:
        run: options of the run; ``batch_size`` are the images of one update over all processes.
        about: what the task says of itself (``Task.about``).
        world: processes.
        rows: images per update that train each stage.
        accumulate: micro-batches.
    """
    device, images = str(run.device), about.get("images_in_data", 0)
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        **about,
        "effective_batch": run.batch_size,
        "batch_per_process": run.batch_size // (world * accumulate),
        "accumulate": accumulate,
        "processes": world,
        "rows_per_stage": list(rows),
        "steps": run.max_steps,
        "epochs": round(run.max_steps * run.batch_size / images, 3) if images else None,
        "versions": {
            "ecar": __version__,
            "commit": source_commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": {"name": device, "kind": torch.cuda.get_device_name(device) if cuda else platform.processor()},
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "command": sys.argv,
    }
