"""Trackers: TensorBoard, Weights & Biases and Trackio behind one small interface, each in a thread of its own.

A tracker is a mirror of ``log.jsonl``: one that fails, or hangs, is off from there on with one warning.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ecar.files.records import read_json, write_atomically

TRACKERS = ("tensorboard", "wandb", "trackio")
_BACKLOG = 1000  # actions that may wait for a slow tracker
_START_SECONDS = 60.0


class Tracker(Protocol):
    """What a tracker does; every method may raise, and is called from one thread only."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """A picture file."""

    def finish(self) -> None:
        """Everything is written when this returns."""


class TensorBoard:
    """Event files in ``run/tensorboard``."""

    def __init__(self, run: Path, step: int, identity: str, record: dict[str, Any]) -> None:
        del identity
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("run", f"```\n{json.dumps(record, indent=2)}\n```", step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases. ``WANDB_MODE=offline`` needs no network; project: ``WANDB_PROJECT``, or ecar.

    ``step`` is a metric of its own, not wandb's counter: that one drops the steps that a resumed run takes again.
    """

    def __init__(self, run: Path, step: int, identity: str, record: dict[str, Any]) -> None:
        del step
        import wandb

        settings = wandb.Settings(login_timeout=30, init_timeout=_START_SECONDS)
        project = os.environ.get("WANDB_PROJECT", "ecar")
        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=project, id=identity, name=run.resolve().name, dir=str(run), resume="allow", config=record,
            settings=settings,
        )  # fmt: skip
        self.run.config.update(record, allow_val_change=True)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        self.run.log({name: self.wandb.Image(str(path)), "step": step})

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio, local unless ``TRACKIO_SPACE_ID`` names a Space; project: ``TRACKIO_PROJECT``, or ecar."""

    def __init__(self, run: Path, step: int, identity: str, record: dict[str, Any]) -> None:
        del step
        import trackio

        self.trackio: Any = trackio
        name = f"{run.resolve().name}-{identity}"  # Trackio knows a run by its name
        space = os.environ.get("TRACKIO_SPACE_ID") or None
        project = os.environ.get("TRACKIO_PROJECT", "ecar")
        self.run: Any = trackio.init(
            project=project, name=name, resume="allow", config=record, space_id=space, embed=False
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self.run.log({name: self.trackio.Image(str(path))}, step=step)

    def finish(self) -> None:
        self.run.finish()


_KINDS: dict[str, Callable[[Path, int, str, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Mirror:
    """One tracker and the thread that talks to it: training neither waits for it nor sees its exceptions.

    Args:
        kind: a name of ``TRACKERS``.
        run: the run's folder.
        step: the step resumed from.
        record: what the run is (options, versions), JSON types.
    """

    def __init__(self, kind: str, run: Path, step: int, record: dict[str, Any]) -> None:
        self.kind, self.off = kind, False
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_BACKLOG)
        started = threading.Event()

        def work() -> None:
            """Start the tracker, then hand it what the queue holds until that ends."""
            try:
                tracker = _KINDS[kind](run, step, _identity(run, kind, step), record)
                started.set()
                while not self.off and (action := self._queue.get()) is not None:
                    action(tracker)
                tracker.finish()
            except ImportError as error:
                self._fail(f"{error}; pip install 'ecar[{'train' if kind == 'tensorboard' else kind}]'")
            except BaseException as error:  # wandb raises some that are no Exception
                self._fail(f"{type(error).__name__}: {error}")
            finally:
                started.set()

        self._thread = threading.Thread(target=work, name=f"tracker {kind}", daemon=True)
        self._thread.start()
        started.wait(_START_SECONDS)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step; returns at once."""
        self._put(lambda tracker: tracker.scalars(step, values))

    def picture(self, name: str, path: Path, step: int) -> None:
        """A picture file; returns at once."""
        self._put(lambda tracker: tracker.picture(name, path, step))

    def close(self, seconds: float) -> None:
        """Wait for what is still to be written, at most ``seconds``."""
        self._put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._fail(f"not finished after {seconds:g} s; what it has not sent is in log.jsonl")

    def _put(self, action: Callable[[Tracker], None] | None) -> None:
        if not self.off:
            try:
                self._queue.put_nowait(action)
            except queue.Full:
                self._fail(f"{_BACKLOG} records behind")

    def _fail(self, reason: str) -> None:
        if not self.off:
            self.off = True
            reason = " ".join(reason.split())[:300]
            print(f"WARNING: {self.kind} is off from here on ({reason}); training goes on", file=sys.stderr, flush=True)


def _identity(run: Path, kind: str, step: int) -> str:
    """The tracker's id of this run, kept in ``run/trackers.json``: a resumed run continues the same one, a run that
    starts from step 0 (``log.jsonl`` does too) gets a new one."""
    path = run / "trackers.json"
    with _FILE_LOCK:
        try:
            known = read_json(path, "")
        except ValueError:  # none yet, or damaged: a tracker is no reason to end a run
            known = {}
        if kind not in known or step == 0:
            known[kind] = secrets.token_hex(4)
            write_atomically(path, (json.dumps(known, indent=1) + "\n").encode())
    return str(known[kind])


_FILE_LOCK = threading.Lock()
