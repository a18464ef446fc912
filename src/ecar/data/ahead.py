"""Work on images by threads, in their order: decoding and scaling leave Python's lock, and are what takes the time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ecar.files.images import BadImageError

T = TypeVar("T")
R = TypeVar("R")
_MAX_THREADS = 16
_PER_THREAD = 4  # results that wait; more would only hold memory


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R | BadImageError]]:
    """Every item with ``work(item)``, or with the BadImageError that it raised, in the order of the items.

    The items themselves are taken on the caller's thread, a few per thread ahead: readers need not be safe for threads.
    """
    threads = min(_cores(), _MAX_THREADS)
    waiting: deque[tuple[T, Future[R | BadImageError]]] = deque()
    pool = ThreadPoolExecutor(threads, "images")
    try:
        for item in items:
            waiting.append((item, pool.submit(_result, work, item)))
            if len(waiting) > _PER_THREAD * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _result(work: Callable[[T], R], item: T) -> R | BadImageError:
    try:
        return work(item)
    except BadImageError as error:
        return error


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
