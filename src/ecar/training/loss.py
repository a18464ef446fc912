"""The training loss: sum_k w_k E |head - v_k|^2 / std(v_k)^2, teacher-forced, all random numbers passed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecar.model import StageModel
from ecar.stages import end_point, interpolate, noises, pyramid


@dataclass(frozen=True)
class Draws:
    """Random numbers of one training batch.

    Attributes:
        noise: e_k, one map (B, C, h_k, w_k) per stage.
        context: noise on the maps that the transformer reads, one per stage but the last.
        times: t, (S, B) in [0, 1].
    """

    noise: list[Tensor]
    context: list[Tensor]
    times: Tensor


def stage_losses(model: StageModel, z: Tensor, labels: Tensor, draws: Draws, rows: tuple[int, ...]) -> list[Tensor]:
    """Loss of each image at each stage it trains.

    Args:
        z: unit-scale latents (B, C, h_S, w_S).
        labels: (B,) class ids, label dropout already applied.
        draws: see ``Draws``.
        rows: stage k trains on the first rows[k] images; rows[0] = B, not increasing. Coarse stages cost little
            and may see more images than fine ones.

    Returns:
        Per stage (rows[k],): mean squared error of the velocity in units of its standard deviation, float32.
    """
    maps, noise = pyramid(z, len(model.plan)), noises(model.plan, draws.noise)
    tokens = token_maps(model, maps, noise, labels, draws, rows)
    losses = []
    for stage, count in zip(model.plan, rows, strict=True):
        t = draws.times[stage.index, :count]
        data = maps[stage.index][:count]
        sample = interpolate(stage, data, noise[stage.index][:count], t)
        embedded = model.head.embed_tokens(stage, tokens[stage.index])
        predicted = model.velocity(stage, sample.x, t, embedded, labels[:count])
        target = model.target(stage, sample.x, data, sample.velocity, t)
        error = (predicted - target).float() / model.velocity_scale(stage)
        losses.append(error.square().mean((1, 2, 3)))
    return losses


class StageLoss(nn.Module):
    """``stage_losses`` as a module, the unit that DDP wraps."""

    def __init__(self, model: StageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, labels: Tensor, draws: Draws, rows: tuple[int, ...]) -> list[Tensor]:
        return stage_losses(self.model, z, labels, draws, rows)


def token_maps(
    model: StageModel, maps: list[Tensor], noise: list[Tensor], labels: Tensor, draws: Draws, rows: tuple[int, ...]
) -> list[Tensor]:
    """M_k for the first rows[k] images, from the real y_<k with context noise.

    Images that train the same stages share one masked pass, so that none computes tokens that nothing reads.
    """
    ends = [
        end_point(s, z, n) + model.config.context_noise * c
        for s, z, n, c in zip(model.plan, maps, noise, draws.context, strict=False)
    ]
    parts: list[list[Tensor]] = [[] for _ in model.plan]
    first = 0
    for count in sorted(set(rows)):
        depth = sum(r >= count for r in rows)  # stages that these images train
        group = slice(first, count)
        for k, m in enumerate(model.transformer([y[group] for y in ends[: depth - 1]], labels[group])):
            parts[k].append(m)
        first = count
    return [torch.cat(p) for p in parts]
