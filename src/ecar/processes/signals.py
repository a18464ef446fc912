"""Ask a run to stop: SIGTERM (a cluster's scheduler), SIGUSR1 (its warning), SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# What the process exits with, so that a script knows whether to start it again: 75 is sysexits' "try again later".
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


class Stopped(BaseException):
    """The run was asked to stop, and its checkpoint is written (where there are no steps, ``step`` 0, what is written
    stays). No ``Exception``: whoever turns those into their own must not take this one for a fault of theirs."""

    def __init__(self, step: int, code: int, where: str = "while data were read, before a step") -> None:
        what = f"after step {step}, checkpoint written" if step else where
        super().__init__(f"stopped {what}; the same command {'resumes' if step else 'goes on'}")
        self.code = code


@contextmanager
def exit_when_stopped() -> Iterator[None]:
    """For a command: ``Stopped`` inside is one line and the exit code of its signal."""
    try:
        yield
    except Stopped as stopped:
        print(f"ecar: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.code) from None


class StopRequest:
    """While it is entered, the first signal sets ``code``; a second one acts as if nobody listened.

    While data are read there is no step to finish: until ``begun`` is set, the first signal raises ``Stopped``. Saves
    replace what was there only when they are whole, so stopping at once does no damage either.

    Args:
        where: what is being done meanwhile, for the message.
    """

    def __init__(self, where: str = "while data were read, before a step") -> None:
        self.code, self.begun, self.where = 0, False, where
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._received) for number in EXIT_CODES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _received(self, number: int, _: FrameType | None) -> None:
        self.code = EXIT_CODES[signal.Signals(number)]
        self._restore()
        if not self.begun:
            raise Stopped(0, self.code, self.where)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
