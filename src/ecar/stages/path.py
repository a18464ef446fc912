"""Noise, end points, jump and velocities of the stages (Eq. 1-5). Nothing here draws random numbers.

Maps are (B, C, h, w); a time t is (B,) in [0, 1], per stage, from noise (0) to data (1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ecar.stages.plan import Stage
from ecar.stages.resize import low_band, up


@dataclass(frozen=True)
class PathSample:
    """Training pair of one stage: the point ``x`` on the path at ``t`` and its ``velocity``, both (B, C, h, w)."""

    x: Tensor
    velocity: Tensor


def noise_of_stage(stage: Stage, fresh: Tensor, before: Tensor | None) -> Tensor:
    """n_k: n_1 = e_1; n_k = (rho/2) U n_{k-1} + fresh part. Every entry is N(0, 1), independent of the others.

    Args:
        fresh: e_k ~ N(0, I), the size of stage k.
        before: n_{k-1}, None for the first stage.
    """
    if before is None:
        return fresh
    # U n_{k-1} repeats each value four times, a low band of variance 1; that of unit noise has variance 1/4.
    return (stage.rho / 2) * up(before) + fresh_part(stage, fresh)


def fresh_part(stage: Stage, fresh: Tensor) -> Tensor:
    """sqrt(1 - rho^2) U D e + (I - U D) e: the new noise of a stage, in the low and in the detail band."""
    low = low_band(fresh)
    return math.sqrt(1 - stage.rho**2) * low + (fresh - low)


def noises(plan: tuple[Stage, ...], fresh: list[Tensor]) -> list[Tensor]:
    """n_1 .. n_S from e_1 .. e_S."""
    result: list[Tensor] = []
    for stage, e in zip(plan, fresh, strict=False):
        result.append(noise_of_stage(stage, e, result[-1] if result else None))
    return result


def end_point(stage: Stage, z: Tensor, noise: Tensor) -> Tensor:
    """y_k = b_k z_k + (1 - b_k) n_k (Eq. 1)."""
    return stage.end * z + (1 - stage.end) * noise


def start_point(stage: Stage, z: Tensor, noise: Tensor) -> Tensor:
    """x_k^0 = a_k U z_{k-1} + (1 - a_k) n_k (Eq. 2), from the stage's own z_k since z_{k-1} = D z_k."""
    if stage.index == 0:
        return noise
    return stage.start * low_band(z) + (1 - stage.start) * noise


def jump(stage: Stage, end_before: Tensor, fresh: Tensor) -> Tensor:
    """x_k^0 from the sampled y_{k-1} and fresh noise e (Eq. 5). It has exactly the law of Eq. 2."""
    return stage.jump * up(end_before) + (1 - stage.start) * fresh_part(stage, fresh)


def interpolate(stage: Stage, z: Tensor, noise: Tensor, t: Tensor) -> PathSample:
    """x_k^t = (1 - t) x_k^0 + t y_k and v_k = y_k - x_k^0 (Eq. 3)."""
    start, end = start_point(stage, z, noise), end_point(stage, z, noise)
    return PathSample(torch.lerp(start, end, t.view(-1, 1, 1, 1)), end - start)


def velocity_std(stage: Stage, z: Tensor) -> float:
    """Standard deviation of v_k for data z_k (B, C, h, w), in closed form over the noise.

    v_k = [b z - a U D z] + (a - b) n, and n is independent of z with unit variance.
    """
    low = low_band(z) if stage.index else torch.zeros_like(z)
    data = stage.end * z - stage.start * low
    return math.sqrt(data.double().square().mean().item() + (stage.end - stage.start) ** 2)


def data_from_end(stage: Stage, y: Tensor, velocity: Tensor) -> Tensor:
    """z_k from the end of a stage, y = y_k, and the velocity there: Eq. 1 and 3 solved for the data.

    Low band: v = (b - a)(z - n), so z = y + v (1 - b) / (b - a).
    Detail band: v = b z - (b - a) n, so z = (v (1 - b) + y (b - a)) / (b (1 - a)).
    """
    a, b = stage.start, stage.end
    low_y, low_v = (low_band(y), low_band(velocity)) if stage.index else (y, velocity)
    low = low_y + low_v * (1 - b) / (b - a)
    detail = ((velocity - low_v) * (1 - b) + (y - low_y) * (b - a)) / (b * (1 - a))
    return low + detail
