"""Exponential moving average of weights, kept in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ecar.training.sharding import local, whole


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
        now = [local(p.detach()).float() for p in module.parameters()]
        torch._foreach_lerp_([local(self.weights[n]) for n in names], now, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module | None) -> None:
        """Write the averages into ``module`` (of the same architecture, not sharded). Where they are sharded every
        process has to call this; those without a module only give their slices."""
        parameters = dict(module.named_parameters()) if module is not None else {}
        for name, average in self.weights.items():
            gathered = whole(average)
            if name in parameters:
                parameters[name].copy_(gathered)
