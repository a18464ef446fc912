"""Random numbers of sampling: one generator per image seed, so that an image does not depend on its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ecar.stages import Stage

MAX_SEED = 2**53 - 1  # exact in JSON
_CANDIDATE_STRIDE = 0x1E3779B97F4A7D  # odd, so that no two candidates of an image share a seed


@dataclass(frozen=True)
class StageNoise:
    """Noise of one stage for a batch: ``fresh`` e_k (B, C, h_k, w_k), ``context`` (B, C, h_{k-1}, w_{k-1}) or None."""

    fresh: Tensor
    context: Tensor | None

    def to(self, device: torch.device) -> StageNoise:
        """The same on a device."""
        return StageNoise(self.fresh.to(device), None if self.context is None else self.context.to(device))

    def select(self, rows: list[int]) -> StageNoise:
        """Noise of some of the rows."""
        return StageNoise(self.fresh[rows], None if self.context is None else self.context[rows])


def draw_noise(seeds: list[int], plan: tuple[Stage, ...], channels: int) -> list[StageNoise]:
    """Noise of every stage, drawn on the CPU so that a seed means the same on every device.

    Raises:
        ValueError: a seed outside 0 .. 2^53 - 1.
    """
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed must be in 0..{MAX_SEED}, got {seed}")
    generators = [_generator(seed) for seed in seeds]
    result = []
    for stage in plan:
        fresh = _stack(generators, (channels, *stage.side))
        before = plan[stage.index - 1].side if stage.index else None
        result.append(StageNoise(fresh, _stack(generators, (channels, *before)) if before else None))
    return result


def candidate_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the candidates for the image of ``seed``: itself first, the others far from what a user counts to."""
    return [(seed + number * _CANDIDATE_STRIDE) % (MAX_SEED + 1) for number in range(count)]


def draw_choices(seeds: list[int], count: int) -> Tensor:
    """Uniform numbers (B, count), by which one of ``count`` candidates is chosen."""
    other = [(seed - _CANDIDATE_STRIDE) % (MAX_SEED + 1) for seed in seeds]  # of no candidate's noise
    return torch.stack([torch.rand(count, generator=_generator(seed)) for seed in other])


def _generator(seed: int) -> torch.Generator:
    """torch's generator on the CPU reads the low 32 bits of a seed. Larger seeds are mixed (MurmurHash3's finalizer),
    lest those that differ in the high bits draw the same image."""
    if seed >= 2**32:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            seed = ((seed ^ seed >> 33) * factor) % 2**64
        seed = (seed ^ seed >> 33) % 2**32
    return torch.Generator().manual_seed(seed)


def _stack(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
