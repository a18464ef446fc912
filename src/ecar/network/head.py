"""The flow head: joint attention over a stage's tokens, conditioned on M_k, t, stage and class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.config import ModelConfig
from ecar.network.block import Block, RMSNorm, initialize
from ecar.network.positions import fourier_features, rotary_table, time_features
from ecar.network.trunk import FOURIER_BANDS
from ecar.stages import Stage, make_plan, to_map, to_tokens


class Conditioning(NamedTuple):
    """What time, class and stage do to the head, for B rows.

    Attributes:
        blocks: modulation of each block, (B, 1, 6 D).
        out: shift and scale before the last layer, (B, 1, 2 D).
        table: rotary table of the stage.
    """

    blocks: tuple[Tensor, ...]
    out: Tensor
    table: Tensor

    def split(self, rows: int) -> list[Self]:
        """Conditionings of ``rows`` rows each."""
        parts = zip(*(tensor.split(rows) for tensor in (*self.blocks, self.out)), strict=True)
        return [type(self)(part[:-1], part[-1], self.table) for part in parts]


class Head(nn.Module):
    """Noisy map of one stage -> velocity of the same shape, in units of its standard deviation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.plan = make_plan(config.stages, config.patch)
        self.width, self.head_dim = config.width, config.width // config.heads
        self.map_in = nn.Linear(config.channels * config.patch**2, config.width)
        self.token_in = nn.Linear(config.width, config.width)
        self.position_in = nn.Linear(4 * FOURIER_BANDS, config.width)
        self.time_mlp = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.stage_embedding = nn.Embedding(len(self.plan), config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.head_depth))
        self.norm_out = RMSNorm(config.width, affine=False)
        self.modulation_out = nn.Linear(config.width, 2 * config.width)
        self.map_out = nn.Linear(config.width, config.channels * config.patch**2)
        initialize(self)
        for last in (self.modulation_out, self.map_out):
            nn.init.zeros_(last.weight)

    def embed_tokens(self, stage: Stage, tokens: Tensor) -> Tensor:
        """M_k (B, n_k, D) -> what is added to the head's input; the same for every step of the stage."""
        features = fourier_features(stage.grid, FOURIER_BANDS, tokens.device)
        return self.token_in(tokens) + self.position_in(features.to(self.position_in.weight.dtype))

    def conditioning(self, stage: Stage, t: Tensor, labels: Tensor) -> Conditioning:
        """Times (B,) or (1,) and class ids (B,) -> what they do."""
        time = self.time_mlp(time_features(t, self.width).to(self.map_in.weight.dtype))
        condition = F.silu(time + self.class_embedding(labels) + self.stage_embedding.weight[stage.index])[:, None]
        blocks = tuple(block.modulate(condition) for block in self._blocks())
        table = rotary_table(stage.grid, self.plan[-1].grid, self.head_dim, t.device)
        return Conditioning(blocks, self.modulation_out(condition), table)

    def conditionings(self, stage: Stage, times: Sequence[float], labels: Tensor) -> list[Conditioning]:
        """``conditioning`` at each of several times, in one pass: a third of the weights of a block is read here, and
        at batch 1 reading weights is what a step costs."""
        # Filled on the device: a copy of a list from the host would wait for the stage before.
        t = torch.stack([torch.full((), time, device=labels.device) for time in times]).repeat_interleave(len(labels))
        return self.conditioning(stage, t, labels.repeat(len(times))).split(len(labels))

    def forward(self, stage: Stage, x: Tensor, conditioning: Conditioning, embedded: Tensor) -> Tensor:
        """x (B, C, h, w), embedded (B, n_k, D) of ``embed_tokens`` -> like x, float32."""
        h = self.map_in(to_tokens(x, stage.patch).to(self.map_in.weight.dtype)) + embedded  # (B, n_k, D)
        for block, modulation in zip(self._blocks(), conditioning.blocks, strict=True):
            h = block(h, modulation, conditioning.table)
        shift, scale = conditioning.out.chunk(2, dim=-1)
        h = self.map_out(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        return to_map(h.float(), stage.grid, stage.patch)

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))
