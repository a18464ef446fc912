"""A request on its way through the engine, as the event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from ecar.sampling.noise import candidate_seeds
from ecar.serving.engine import Engine
from ecar.serving.errors import ApiError
from ecar.serving.order import Order
from ecar.serving.rows import EngineError, Event, Failed, Finished, Group, Preview, Row

GRACE = 5.0  # seconds after the deadline in which the engine itself reports it; a device that hangs does not


class Job:
    """The rows of one order. Its events wait here, at most one per preview and image: a client that does not read
    costs no more than that.

    Raises:
        ApiError: the engine does not take it.
    """

    def __init__(self, engine: Engine, order: Order) -> None:
        self.order = order
        self._loop, self._deadline = asyncio.get_running_loop(), time.monotonic() + engine.limits.deadline
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._rows = [row for index, seed in enumerate(order.seeds) for row in self._rows_of(index, seed)]
        try:
            engine.submit(self._rows)
        except EngineError as error:
            engine.metrics.rejected.labels(error.code).inc()
            self._rows = []
            raise ApiError.of(error) from None

    def _rows_of(self, index: int, seed: int) -> list[Row]:
        """An image's row, or those of its candidates."""
        if self.order.candidates == 1:
            return [self._row(index, seed, None)]
        group = Group(seed, candidate_seeds(seed, self.order.candidates))
        return [self._row(index, own, group) for own in group.seeds]

    def _row(self, index: int, seed: int, group: Group | None) -> Row:
        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        order = self.order
        return Row(
            order.label, seed, order.settings, emit, order.points, self._deadline, group=group, redraw=order.redraw
        )

    def cancel(self) -> None:
        """Rows that are not finished leave at the next stage boundary."""
        for row in self._rows:
            row.cancelled = True
        # Rows know this job and the job its rows: a cycle, which would keep images until a full garbage collection.
        self._rows = []

    async def events(self, ping: float | None = None) -> AsyncIterator[tuple[int, Preview | Finished] | None]:
        """(image index, event) until every image is finished; None after each ``ping`` seconds of silence.

        Raises:
            ApiError: one image failed, or time is up; the others are cancelled then.
        """
        left = len(self.order.seeds)
        try:
            while left:
                remaining = self._deadline + GRACE - time.monotonic()
                try:
                    if not self._events.empty():  # in time, however slowly it is read
                        index, event = self._events.get_nowait()
                    elif remaining <= 0:
                        raise ApiError(504, "deadline_exceeded", "the engine did not answer in time")
                    else:
                        wait = remaining if ping is None else min(ping, remaining)
                        index, event = await asyncio.wait_for(self._events.get(), wait)
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, Failed):
                    raise ApiError.of(event.error)
                left -= isinstance(event, Finished)
                yield index, event
        finally:
            self.cancel()
