"""Classifier-free guidance of velocities (2207.12598)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond); 1 is off, 0 is unconditional."""
    return unconditional + scale * (conditional - unconditional)


def guide_halves(both: Tensor, scale: float) -> Tensor:
    """The same for a batch whose first half is conditional and whose second half is not: (2 B, ...) -> (B, ...)."""
    conditional, unconditional = both.chunk(2)
    return guide(conditional, unconditional, scale)
