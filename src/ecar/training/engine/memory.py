"""A message where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class MemoryLimitError(RuntimeError):
    """The device has too little memory for the run as it was asked for."""


@contextmanager
def memory_advice(accumulate: int) -> Iterator[None]:
    """Out of memory -> one line that says what helps.

    Raises:
        MemoryLimitError: in the place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = str(error).split(". ")[0]
        raise MemoryLimitError(
            f"{what}; the same command resumes with --accumulate {2 * accumulate} (smaller parts, same result) "
            f"or, over several processes, --parallel fsdp; a new run may take a smaller --batch-size"
        ) from error
