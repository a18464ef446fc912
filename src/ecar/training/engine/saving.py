"""When and how a run saves: at once or in the background, and what a failed save means."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ecar.processes.world import World
from ecar.training.engine.checkpoint import save_checkpoint
from ecar.training.engine.log import RunLog

MAX_FAILED_SAVES = 3


class Saver:
    """Writes the checkpoints of a run, at most one at a time.

    A disk that is full now may have room at the next save: only several failures in a row end the run, and one of the
    last save. Rank 0 counts; a failure that ends it there ends the others too.

    Args:
        out: folder of the run.
        world: the processes; all of them have to make the same calls.
        log: of rank 0.
        background: copy the state and go on; what became of it is known at a later ``settle``.
        saved: step of the newest checkpoint there.
    """

    def __init__(self, out: Path, world: World, log: RunLog | None, *, background: bool, saved: int) -> None:
        self.out, self.world, self.log, self.background, self.saved = out, world, log, background, saved
        self._failures, self._step, self._work = 0, saved, _done()

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any], *, last: bool) -> None:
        """Save, or begin to; a save before it that has not ended is waited for.

        Raises:
            OSError: this was the last try (see the class), or the ``last`` save failed.
        """
        self.settle(wait=True)
        self._step = step
        try:
            self._work = self._begin(step, tensors, record)
        except OSError as error:
            self._work = _done(error)
        if last or not self.background:
            self.settle(wait=True, last=last)

    def settle(self, *, wait: bool = False, last: bool = False) -> None:
        """Look at the save on its way, if it has ended (with ``wait``: when it has).

        Raises:
            OSError: as ``save`` does.
        """
        if not (wait or self._work.done()) or self._step == self.saved:
            return
        try:
            self._work.result()
        except OSError as error:
            self._failed(error, last)
        else:
            self._failures, self.saved = 0, self._step
        self._step = self.saved

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """A run that ends by an error ends after the save on its way, whatever becomes of it; Ctrl-C does not wait."""
        if isinstance(error, Exception):
            self._work.exception()

    def _begin(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> Future[None]:
        if self.world.rank:
            return _done()
        if self.background:  # on CPU .cpu() is no copy
            tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

        def work() -> None:
            save_checkpoint(self.out, step, tensors, record)

        return _in_background(work) if self.background else _now(work)

    def _failed(self, error: OSError, last: bool) -> None:
        self._failures += 1
        if last or self._failures >= MAX_FAILED_SAVES:
            raise error
        if self.log is not None:
            message = f"WARNING: step {self._step}: no checkpoint ({error}); training goes on"
            print(message, file=sys.stderr, flush=True)
            self.log.write(step=self._step, failed_save=str(error))


def in_background(device: str) -> bool:
    """Whether saves are: a GPU's state is copied off it anyway, and a CPU's would take memory and a core twice."""
    return device.startswith("cuda")


def _done(error: OSError | None = None) -> Future[None]:
    future: Future[None] = Future()
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
    return future


def _now(work: Callable[[], None]) -> Future[None]:
    work()
    return _done()


def _in_background(work: Callable[[], None]) -> Future[None]:
    """On a thread that does not hold up the end of the process: a save that is cut off does no damage."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    Thread(target=run, name="save", daemon=True).start()
    return future
