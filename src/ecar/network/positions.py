"""Positions in image coordinates, shared by all stages: 2-D rotary embedding and absolute Fourier features.

A position of a coarse map stands at the centre of the finer positions under it, so coordinates of different stages
can be compared: position i of n sits at (i + 1/2) / n of the side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ecar.config import Side

_ROTARY_BASE = 100.0


def coordinates(side: Side, device: torch.device | None = None) -> Tensor:
    """(h w, 2): row and column of each position in (0, 1), row by row."""
    rows = (torch.arange(side[0], device=device) + 0.5) / side[0]
    columns = (torch.arange(side[1], device=device) + 0.5) / side[1]
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def rotary_table(side: Side, finest: Side, head_dim: int, device: torch.device | None = None) -> Tensor:
    """(2, h w, head_dim / 2): cosines and sines of the 2-D rotary embedding (RoFormer 2104.09864).

    Angles are in steps of the finest grid; the first half of the pairs turns with the row, the second with the column.
    """
    pairs = head_dim // 4
    frequencies = _ROTARY_BASE ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    grid = coordinates(side, device)
    grid = torch.stack([grid[:, 0] * finest[0], grid[:, 1] * finest[1]], dim=-1)  # no tensor comes from the host
    angles = (grid[:, :, None] * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding: x (B, heads, N, head_dim), table (2, N, head_dim / 2) -> same shape as x."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def fourier_features(side: Side, bands: int, device: torch.device | None = None) -> Tensor:
    """(h w, 4 bands): sines and cosines of the coordinates at octaves from half a period over the side upwards."""
    frequencies = math.pi * 2.0 ** torch.arange(bands, device=device, dtype=torch.float32)
    phases = (coordinates(side, device)[:, :, None] * frequencies).flatten(1)
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features (B, width) of times (B,) in [0, 1]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phases = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=-1)
