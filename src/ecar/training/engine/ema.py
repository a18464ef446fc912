"""Exponential moving averages of weights, kept in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ecar.training.engine.parallel import cut, local


class EMA:
    """Averages of a module's trainable parameters with warm-up: decay_n = min(decay, (1 + n) / (10 + n)) after n
    updates. One per decay; the first is the one that is sampled and shipped.

    Float32 whatever the training dtype: in bfloat16 a step of 1e-4 is below the rounding step and the average
    would stand still.

    Args:
        module: what is averaged.
        decay: in [0, 1), one or several different ones.
    """

    def __init__(self, module: nn.Module, decay: float | Sequence[float]) -> None:
        self.decays = (decay,) if isinstance(decay, float | int) else tuple(decay)
        if not self.decays or any(not 0 <= d < 1 for d in self.decays):
            raise ValueError(f"ema decay must be in [0, 1), got {decay}")
        self.updates = 0
        self.averages: dict[float, dict[str, Tensor]] = {
            d: {n: p.detach().float().clone() for n, p in _trainable(module)} for d in self.decays
        }

    @property
    def weights(self) -> dict[str, Tensor]:
        """The first average: parameter name -> tensor."""
        return self.averages[self.decays[0]]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move every average towards the present weight."""
        names, now = zip(*((n, local(p.detach()).float()) for n, p in _trainable(module)), strict=True)
        for decay, average in self.averages.items():
            share = 1 - min(decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_([local(average[n]) for n in names], list(now), share)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the first average into ``module`` (of the same architecture)."""
        for name, parameter in module.named_parameters():
            if name in self.weights:
                parameter.copy_(self.weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """All averages, flat: ``ema.NAME`` for the first, ``ema_DECAY.NAME`` for the others."""
        first = self.decays[0]
        return {
            ("ema." if decay == first else f"ema_{decay}.") + name: tensor
            for decay, average in self.averages.items()
            for name, tensor in average.items()
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``, in place."""
        for name, tensor in self.tensors().items():
            tensor.copy_(cut(tensors[name], tensor))


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]
