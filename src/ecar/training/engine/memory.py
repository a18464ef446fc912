"""What trades time for memory: activation checkpointing, and a message where memory ran out all the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class MemoryLimitError(RuntimeError):
    """The device has too little memory for the run as it was asked for."""


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Blocks keep their inputs only, and compute the rest again in the backward pass. Same losses and gradients; names
    of weights do not change. Blocks draw no random numbers, so that none need to be kept."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


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
            f"{what}; the same command resumes with --accumulate {2 * accumulate} (smaller parts, same result), "
            f"--activation-checkpointing or, over several processes, --parallel fsdp; a new run may take a smaller "
            f"--batch-size"
        ) from error
