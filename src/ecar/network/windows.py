"""Attention within groups of tokens, so that its cost grows as the number of tokens: block and grid (2204.01697)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ecar.config import Side


@dataclass(frozen=True)
class Windows:
    """Groups of size x size tokens of a map.

    Attributes:
        side: (height, width) of the map in tokens, multiples of ``size``.
        size: side of a group.
        spread: a group is a grid over the whole map, every height / size-th row and width / size-th column; else it is
            a square of neighbours. Two blocks, one of each kind, connect any two tokens.
    """

    side: Side
    size: int
    spread: bool

    def split(self, x: Tensor) -> Tensor:
        """(B, heads, N, d), rows of the map one after the other -> (B groups, heads, size^2, d)."""
        tokens = "(y i x j)" if self.spread else "(i y j x)"
        return rearrange(x, f"b h {tokens} d -> (b i j) h (y x) d", **self._sizes())

    def join(self, x: Tensor) -> Tensor:
        """The inverse of ``split``."""
        tokens = "(y i x j)" if self.spread else "(i y j x)"
        return rearrange(x, f"(b i j) h (y x) d -> b h {tokens} d", **self._sizes())

    def groups(self) -> Tensor:
        """(N,): the number of each token's group."""
        height, width = self.side
        tokens = self.split(torch.arange(height * width)[None, None, :, None])  # (groups, 1, size^2, 1)
        return tokens.flatten().argsort() // self.size**2

    def copies(self, x: Tensor) -> Tensor:
        """(B, heads, M, d) that every group sees -> (B groups, heads, M, d)."""
        height, width = self.side
        return x.repeat_interleave(height * width // self.size**2, dim=0)

    def _sizes(self) -> dict[str, int]:
        height, width = self.side
        return {"i": height // self.size, "j": width // self.size, "y": self.size, "x": self.size}


def windows_of(side: Side, size: int, block: int) -> Windows | None:
    """Of block number ``block`` on a map of ``side``: squares and grids in turn; None where all tokens of the map see
    each other (``size`` 0, or a map no larger)."""
    return Windows(side, size, bool(block % 2)) if size and max(side) > size else None
