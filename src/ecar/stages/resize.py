"""D and U: pooling and nearest upsampling of maps; maps <-> tokens."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def down(x: Tensor) -> Tensor:
    """D, 2x2 mean pooling: (B, C, 2h, 2w) -> (B, C, h, w)."""
    return F.avg_pool2d(x, 2)


def up(x: Tensor) -> Tensor:
    """U, nearest 2x upsampling: (B, C, h, w) -> (B, C, 2h, 2w). D U is the identity."""
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def low_band(x: Tensor) -> Tensor:
    """U D, the projection on what the next coarser map can hold: (B, C, 2h, 2w) -> same."""
    return up(down(x))


def pyramid(z: Tensor, stages: int) -> list[Tensor]:
    """z_1 .. z_S, coarse to fine, with z_S = z and z_{k-1} = D z_k."""
    maps = [z]
    for _ in range(stages - 1):
        maps.insert(0, down(maps[0]))
    return maps


def to_tokens(x: Tensor, patch: int = 1) -> Tensor:
    """(B, C, p h, p w) -> (B, h w, C p p), row by row; p is ``patch``."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def to_map(tokens: Tensor, grid: tuple[int, int], patch: int = 1) -> Tensor:
    """The inverse, for ``grid`` (h, w) in tokens: (B, h w, C p p) -> (B, C, p h, p w)."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)
