"""A process that stalls, found by the others: they say which one and where, and end.

Every process tells the others, through torch's store, how far it is; a thread of each one looks at what all of them
say. A stopped process, a lost machine or a hanging read would otherwise keep the rest waiting in a collective.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType
from typing import Self

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ecar.processes.world import World

STALL_SECONDS = 900.0  # longer than the longest honest wait, a sample grid or a save
# In the order of a step: whoever is least far is whom the others wait for.
PHASES = ("reading data", "forward pass", "backward pass", "update", "saving or sampling", "waiting for the others")
READ, FORWARD, BACKWARD, UPDATE, SAVE, WAIT = range(len(PHASES))


class Seen:
    """What is known of the ranks, and since when.

    Args:
        size: number of ranks.
        limit: seconds after which a rank counts as stalled.
        now: seconds of a clock that only goes forward, as below.
    """

    def __init__(self, size: int, limit: float, now: float) -> None:
        self.limit = limit
        self._beats = dict.fromkeys(range(size), (-1, now))  # number of the last sign of life, when it was first seen
        self._places = dict.fromkeys(range(size), (0, READ))
        self._moved = now  # when whoever is least far last moved on

    def update(self, said: dict[int, str], now: float) -> None:
        """Take in what ranks said last: "number-of-sign-of-life step phase"."""
        behind = min(self._places.values())
        for rank, text in said.items():
            beat, step, phase = (int(x) for x in text.split())
            if self._beats[rank][0] != beat:
                self._beats[rank] = beat, now
            self._places[rank] = step, phase
        if min(self._places.values()) != behind:
            self._moved = now

    def stalled(self, now: float) -> str | None:
        """Which ranks do not go on, in words; None while all do."""
        silent = [rank for rank, (_, since) in self._beats.items() if now - since > self.limit]
        if silent:
            return f"no sign of life from {self._name(silent)}"
        if now - self._moved <= self.limit:
            return None
        behind = min(self._places.values())
        return f"no progress by {self._name([rank for rank, place in self._places.items() if place == behind])}"

    def _name(self, ranks: list[int]) -> str:
        step, phase = self._places[ranks[0]]
        return f"rank {', '.join(map(str, ranks))} (step {step}, {PHASES[phase]})"


class Watchdog:
    """While it is entered, a rank that makes no progress for ``STALL_SECONDS`` ends the run with exit code 1.

    Args:
        world: the processes; one alone is not watched.
        patience: times ``STALL_SECONDS``, where what a rank does between two signs of progress takes longer.
        end: what to do in the end; leaves the process by default, since its main thread is stuck.
    """

    def __init__(self, world: World, end: Callable[[int], object] = os._exit, patience: float = 1.0) -> None:
        self.world, self.timeout, self.end = world, patience * STALL_SECONDS, end
        self.interval = min(1.0, self.timeout / 10)
        self._place, self._over = (0, READ), Event()
        self._thread: Thread | None = None

    def at(self, step: int, phase: int) -> None:
        """This rank is there. Costs nothing: the thread passes it on."""
        self._place = step, phase

    def __enter__(self) -> Self:
        if self.world.size > 1:
            self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        if self._thread is not None:  # it may hang in the store of a process that is gone, as long as a timeout takes
            self._thread.join(2 * self.interval)

    def _watch(self) -> None:
        store, beat, answered = None, 0, time.monotonic()
        seen = Seen(self.world.size, self.timeout - 2 * self.interval, answered)
        while not self._over.wait(self.interval):
            beat += 1
            try:
                store = store or _connect(self.timeout)
                store.set(f"beat/{self.world.rank}", " ".join(map(str, (beat, *self._place))))
                keys = {rank: f"beat/{rank}" for rank in range(self.world.size)}
                said = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
                answered = time.monotonic()
                seen.update(said, answered)
            except (RuntimeError, ValueError):  # nobody answers: the process that keeps the store is gone or stopped
                store = None
            now = time.monotonic()
            reason = seen.stalled(now)
            if reason is None and now - answered > seen.limit:
                reason = "the process that holds the store does not answer"
            if reason is not None and not self._over.is_set():
                message = f"ecar: rank {self.world.rank}: {reason} for {self.timeout:g} s; stopping"
                print(message, file=sys.stderr, flush=True)
                self.end(1)
                return


def _connect(timeout: float) -> Store:
    """A connection of its own to the store that torchrun keeps: the main thread may hang in the other one."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
    attempt = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return PrefixStore(f"ecar/{attempt}", store)
