"""Work that takes long enough to hold the event loop up, in threads of its own.

Few threads: each that runs Python takes Python's lock from the event loop for a while (twenty that encode PNG delayed
it by up to 90 ms, two by 10 ms).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from ecar.serving.errors import ApiError

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """Calls functions beside the event loop.

    Args:
        name: of the threads.
        count: how many run at once.
        most: how many may run and wait together; None: no bound, for work that is bounded otherwise.
    """

    def __init__(self, name: str, count: int, most: int | None = None) -> None:
        self._pool, self._most, self._inside = ThreadPoolExecutor(count, name), most, 0

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns or raises.

        Raises:
            ApiError: 429, too many wait.
        """
        if self._most is not None and self._inside >= self._most:
            raise ApiError(
                429, "queue_full", "too many requests are being checked; try again", None, {"retry-after": "1"}
            )
        self._inside += 1
        try:
            return await asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))
        finally:
            self._inside -= 1


ENCODING = Threads("ecar-encode", min(4, os.cpu_count() or 1))
