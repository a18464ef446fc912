"""Exponential moving average of weights, kept in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Average of a module's parameters with warm-up: decay_n = min(decay, (1 + n) / (10 + n)) after n updates.

    Float32 whatever the training dtype: in bfloat16 a step of 1e-4 is below the rounding step and the average
    would stand still.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must be in [0, 1), got {decay}")
        self.decay, self.updates = decay, 0
        self.weights: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move every average towards the present weight."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names = [n for n, _ in module.named_parameters()]
        now = [p.detach().float() for p in module.parameters()]
        torch._foreach_lerp_([self.weights[n] for n in names], now, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into ``module`` (of the same architecture)."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weights[name])
