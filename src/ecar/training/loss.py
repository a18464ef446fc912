"""The training loss: sum_k w_k E |head - v_k|^2 / std(v_k)^2, teacher-forced, all random numbers passed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecar.network.model import StageModel
from ecar.stages import end_point, interpolate, noises, pyramid
from ecar.training.distill import Teacher


@dataclass(frozen=True)
class Draws:
    """Random numbers of one training batch.

    Attributes:
        noise: e_k, one map (B, C, h_k, w_k) per stage.
        context: noise on the maps that the trunk reads, one per stage but the last.
        times: t, (S, B) in [0, 1].
    """

    noise: list[Tensor]
    context: list[Tensor]
    times: Tensor

    def select(self, rows: slice) -> Draws:
        """Those of some images."""
        return Draws([n[rows] for n in self.noise], [c[rows] for c in self.context], self.times[:, rows])

    def to(self, device: str) -> Draws:
        """The same on a device."""
        return Draws([n.to(device) for n in self.noise], [c.to(device) for c in self.context], self.times.to(device))


def stage_losses(
    model: StageModel, z: Tensor, labels: Tensor, draws: Draws, rows: tuple[int, ...], teacher: Teacher | None = None
) -> list[Tensor]:
    """Loss of each image at each stage it trains.

    Args:
        model: in training.
        z: unit-scale latents (B, C, h_S, w_S).
        labels: (B,) class ids, label dropout already applied.
        draws: see ``Draws``.
        rows: stage k trains on the first rows[k] images; rows[0] = B, not increasing. Coarse stages cost little
            and may see more images than fine ones.
        teacher: whose velocities are the target, instead of the data's.

    Returns:
        Per stage (rows[k],): mean squared error of the velocity in units of its standard deviation, float32.
    """
    maps, noise = pyramid(z, len(model.plan)), noises(model.plan, draws.noise)
    ends = [end_point(s, z, n) for s, z, n in zip(model.plan[:-1], maps, noise, strict=False)]
    tokens = token_maps(model, ends, labels, draws, rows)
    theirs = None if teacher is None else teacher_tokens(teacher, ends, labels, draws, rows)
    losses = []
    for stage, count in zip(model.plan, rows, strict=True):
        t = draws.times[stage.index, :count]
        sample = interpolate(stage, maps[stage.index][:count], noise[stage.index][:count], t)
        embedded = model.head.embed_tokens(stage, tokens[stage.index])
        predicted = model.velocity(stage, sample.x, t, embedded, labels[:count])
        target = sample.velocity
        if teacher is not None and theirs is not None:
            with torch.no_grad():
                target = teacher.target(stage, sample.x, t, labels[:count], *(maps[stage.index] for maps in theirs))
        error = (predicted - target).float() / model.velocity_scale(stage)
        losses.append(error.square().mean((1, 2, 3)))
    return losses


class StageLoss(nn.Module):
    """``stage_losses`` as a module, the unit that DDP wraps."""

    def __init__(self, model: StageModel, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.model, self.teacher = model, teacher  # the teacher is no module: nothing of it is wrapped or cut

    def forward(self, z: Tensor, labels: Tensor, draws: Draws, rows: tuple[int, ...]) -> list[Tensor]:
        return stage_losses(self.model, z, labels, draws, rows, self.teacher)


def token_maps(
    model: StageModel, ends: list[Tensor], labels: Tensor, draws: Draws, rows: tuple[int, ...]
) -> list[Tensor]:
    """M_k for the first rows[k] images, from y_<k with context noise.

    Images that train the same stages share one masked pass, so that none computes tokens that nothing reads.
    """
    ends = [y + model.config.context_noise * c for y, c in zip(ends, draws.context, strict=True)]
    parts: list[list[Tensor]] = [[] for _ in model.plan]
    first = 0
    for count in sorted(set(rows)):
        depth = sum(r >= count for r in rows)  # stages that these images train
        group = slice(first, count)
        for k, m in enumerate(model.trunk([y[group] for y in ends[: depth - 1]], labels[group])):
            parts[k].append(m)
        first = count
    return [torch.cat(p) for p in parts]


@torch.no_grad()
def teacher_tokens(
    teacher: Teacher, ends: list[Tensor], labels: Tensor, draws: Draws, rows: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """M_k of the teacher for the classes and for the null class; without guidance, the first ones again."""
    tokens = null = token_maps(teacher.model, ends, labels, draws, rows)
    if any(scale != 1 for scale in teacher.guidance):
        null = token_maps(teacher.model, ends, teacher.null(labels), draws, rows)
    return tokens, null
