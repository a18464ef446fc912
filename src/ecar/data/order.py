"""The order of training: a pure function of (seed, epoch); its whole state is one counter."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The permutation of 0 .. size-1 for an epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, 1, epoch)))


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Rows (batch_size,) of step 0, 1, 2, ...: consecutive places of the endless concatenation of epochs."""
    parts, place, end = [], step * batch_size, (step + 1) * batch_size
    while place < end:
        epoch, start = divmod(place, size)
        parts.append(epoch_order(size, seed, epoch)[start : start + end - place])
        place += len(parts[-1])
    return torch.cat(parts)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from numbers; other numbers, other streams (FNV-1a over the parts)."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) & (2**64 - 1)
    return value >> 1
