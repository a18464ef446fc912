"""The trunk: maps of the earlier stages and the class -> one condition token per position of each stage.

Shapes: B batch, n_k = h_k w_k tokens of stage k, N = sum of n_k, C latent channels, D width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.config import ModelConfig
from ecar.network.block import Block, RMSNorm, initialize
from ecar.network.cache import StageCache
from ecar.network.positions import fourier_features, rotary_table
from ecar.stages import Stage, make_plan, to_tokens, up

FOURIER_BANDS = 6


class Trunk(nn.Module):
    """Block-causal over stages: a token sees every token of its own stage and of the stages before.

    A token is a square of ``config.patch`` x ``config.patch`` positions, so n_k = h_k w_k / patch^2.
    The input at stage k > 1 is the map y_{k-1} upsampled to the stage's side; stage 1 has only class and position.
    ``forward`` (all stages, masked, teacher-forced) and ``step`` (one stage, cached) give the same token maps.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.plan = make_plan(config.stages, config.patch)
        self.heads, self.head_dim = config.heads, config.width // config.heads
        self.map_in = nn.Linear(config.channels * config.patch**2, config.width)
        self.position_in = nn.Linear(4 * FOURIER_BANDS, config.width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.stage_embedding = nn.Embedding(len(self.plan), config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.trunk_depth))
        self.norm_out = RMSNorm(config.width)
        initialize(self)

    def forward(self, ends: list[Tensor], labels: Tensor) -> list[Tensor]:
        """All stages at once under the block-causal mask.

        Args:
            ends: y_1 .. y_{K-1}, each (B, C, h_k, w_k), as the trunk reads them (context noise included).
                Their number + 1 is the number K of stages computed.
            labels: (B,) class ids; the null class is ``num_classes``.

        Returns:
            M_1 .. M_K, each (B, n_k, D).
        """
        stages = self.plan[: len(ends) + 1]
        inputs = [self._embed(s, ends[s.index - 1] if s.index else None, labels) for s in stages]
        sizes = [s.tokens for s in stages]
        device = labels.device
        groups = torch.cat(
            [torch.full((n,), k, device=device) for k, n in enumerate(sizes)]
        )  # (N,) stage of each token
        table = torch.cat([self._table(s, device) for s in stages], dim=1)  # (2, N, head_dim / 2)
        condition = torch.stack([self._condition(s, labels) for s in stages], dim=1)  # (B, K, D)
        x = torch.cat(inputs, dim=1)  # (B, N, D)
        several = len(stages) > 1
        mask = groups[:, None] >= groups if several else None  # (N, N)
        for block in self._blocks():
            x = block(x, block.modulate(condition), table, groups=groups if several else None, mask=mask)
        return list(self.norm_out(x).split(sizes, dim=1))

    def step(self, stage: Stage, end_before: Tensor | None, labels: Tensor, cache: StageCache) -> Tensor:
        """One stage, attending to the cached stages before it; appends itself to ``cache``.

        Args:
            stage: a stage of the plan; the cache must hold exactly those before it.
            end_before: y_{k-1} (B, C, h_{k-1}, w_{k-1}); None for the first stage.
            labels: (B,) class ids.

        Returns:
            M_k (B, n_k, D).
        """
        assert cache.length == sum(s.tokens for s in self.plan[: stage.index]), "the cache holds other stages"
        x = self._embed(stage, end_before, labels)
        condition, table = self._condition(stage, labels)[:, None], self._table(stage, labels.device)
        for layer, block in enumerate(self._blocks()):
            x = block(x, block.modulate(condition), table, memory=cache.memory(layer, stage.tokens))
        cache.advance(stage.tokens)
        return self.norm_out(x)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> StageCache:
        """An empty cache for ``batch`` rows; the last stage needs no place in it but gets one (its keys are read)."""
        return StageCache(
            layers=len(self.blocks),
            batch=batch,
            heads=self.heads,
            head_dim=self.head_dim,
            tokens=sum(s.tokens for s in self.plan),
            device=device,
            dtype=dtype,
        )

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _embed(self, stage: Stage, end_before: Tensor | None, labels: Tensor) -> Tensor:
        features = fourier_features(stage.grid, FOURIER_BANDS, labels.device)
        x = (
            self.position_in(features.to(self.position_in.weight.dtype)) + self.stage_embedding.weight[stage.index]
        )  # (n_k, D)
        x = x + self.class_embedding(labels)[:, None]  # (B, n_k, D)
        if end_before is not None:
            x = x + self.map_in(to_tokens(up(end_before), stage.patch).to(self.map_in.weight.dtype))
        return x

    def _condition(self, stage: Stage, labels: Tensor) -> Tensor:
        return F.silu(self.class_embedding(labels) + self.stage_embedding.weight[stage.index])  # (B, D)

    def _table(self, stage: Stage, device: torch.device) -> Tensor:
        return rotary_table(stage.grid, self.plan[-1].grid, self.head_dim, device)
