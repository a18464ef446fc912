"""The flow head: joint attention over a stage's tokens, conditioned on M_k, t, stage and class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ecar.config import ModelConfig
from ecar.stages import Stage, make_plan, to_map, to_tokens
from ecar.transformer.block import Block, RMSNorm, initialize
from ecar.transformer.model import FOURIER_BANDS
from ecar.transformer.positions import fourier_features, rotary_table, time_features


class FlowHead(nn.Module):
    """Noisy map of one stage -> raw prediction of the same shape (normalised velocity, or data)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.plan = make_plan(config.stages)
        self.width, self.head_dim = config.width, config.width // config.heads
        self.map_in = nn.Linear(config.channels, config.width)
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
        self.map_out = nn.Linear(config.width, config.channels)
        initialize(self)
        for last in (self.modulation_out, self.map_out):
            nn.init.zeros_(last.weight)

    def embed_tokens(self, stage: Stage, tokens: Tensor) -> Tensor:
        """M_k (B, n_k, D) -> what is added to the head's input; the same for every step of the stage."""
        features = fourier_features(stage.side, FOURIER_BANDS, tokens.device)
        return self.token_in(tokens) + self.position_in(features.to(self.position_in.weight.dtype))

    def forward(self, stage: Stage, x: Tensor, t: Tensor, embedded: Tensor, labels: Tensor) -> Tensor:
        """x (B, C, h, w), t (B,) or (1,), embedded (B, n_k, D) of ``embed_tokens``, labels (B,) -> like x, float32."""
        h = self.map_in(to_tokens(x).to(self.map_in.weight.dtype)) + embedded  # (B, n_k, D)
        time = self.time_mlp(time_features(t, self.width).to(self.map_in.weight.dtype))
        condition = time + self.class_embedding(labels) + self.stage_embedding.weight[stage.index]
        condition = F.silu(condition)[:, None]  # (B, 1, D)
        table = rotary_table(stage.side, self.plan[-1].side, self.head_dim, x.device)
        for block in self.blocks:
            h = block(h, condition, table)
        shift, scale = self.modulation_out(condition).chunk(2, dim=-1)
        h = self.map_out(self.norm_out(h) * (1 + scale) + shift)
        return to_map(h.float(), stage.side)
