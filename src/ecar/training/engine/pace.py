"""Steps that become far slower than the first ones: on a CPU, most often other processes took its cores."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from ecar.training.engine.log import RunLog

_SKIPPED, _FIRST, _LAST = 2, 10, 5  # steps: compiling and first allocations, what is usual, what is compared with it
_FAR = 5.0  # times slower


class Pace:
    """Says once, on stderr and in the log, that the last steps all took several times as long as the first ones.

    OpenMP's threads wait for each other by spinning. Where another process holds one of their cores, all of them wait
    for it in every layer: the same training has run 90 times slower.

    Args:
        device: of the training; nothing is said of any but a CPU.
        log: of rank 0; other ranks have none and say nothing.
        threads: of torch; one alone waits for no other.
        clock: seconds, only forward.
    """

    def __init__(
        self,
        device: str,
        log: RunLog | None,
        *,
        threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.log, self.clock = log, clock
        self.threads = torch.get_num_threads() if threads is None else threads
        self._watching = device == "cpu" and self.threads > 1 and log is not None
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_LAST)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the work of a step, without saves and sample grids."""
        start = self.clock()
        yield
        if self._watching:
            self._took(number, self.clock() - start)

    def _took(self, number: int, seconds: float) -> None:
        if len(self._first) < _SKIPPED + _FIRST:
            self._first.append(seconds)
            return
        self._last.append(seconds)
        usual = max(median(self._first[_SKIPPED:]), 1e-9)
        if len(self._last) < _LAST or min(self._last) < _FAR * usual:
            return
        self._watching = False
        message = (
            f"the last {_LAST} steps took {median(self._last) / usual:.0f} times as long as the first ones; if other "
            f"processes use these cores, torch's {self.threads} threads wait for each other: stop this run (Ctrl-C "
            f"saves it) and resume it by the same command with OMP_NUM_THREADS=1, or as many as cores are free"
        )
        print(f"WARNING: step {number}: {message}", file=sys.stderr, flush=True)
        assert self.log is not None
        self.log.write(step=number, warning=message)
