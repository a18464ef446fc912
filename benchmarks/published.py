"""Cost of published systems at 256x256, *computed* from their configurations: nothing here was run.

Configurations: SiT 2401.08740 (DiT's network), MAR 2406.11838, VAR 2404.02905, FlowAR 2412.15205 and its README.
FLOPs are 2 per multiply-accumulate, per image, with guidance as the authors sample; decoders are not in it. A test
holds the parameters that follow from the same numbers against the published ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecar.config import SamplingConfig
from ecar.cost.formulas import sampling_flops
from ecar.network.presets import preset_config

_MAR_BUFFER = 64
_VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_VAR_VOCABULARY = 4096
_FLOWAR_SIDES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Computed:
    """A published system: how it samples, parameters of its blocks, FLOPs per image."""

    name: str
    sampling: str
    parameters: int
    trunk_flops: int
    head_flops: int

    @property
    def total(self) -> int:
        """FLOPs of one image."""
        return self.trunk_flops + self.head_flops


def _block(width: int, tokens: float, keys: float) -> float:
    """Multiply-accumulates of attention and a feed-forward of 8 D² per token."""
    return 12 * tokens * width**2 + 2 * tokens * keys * width


def _cached(width: int, sides: tuple[int, ...]) -> float:
    """One block over all scales with a key-value cache."""
    total, seen = 0.0, 0
    for side in sides:
        seen += side**2
        total += _block(width, side**2, seen)
    return total


def sit(steps: int) -> Computed:
    """SiT-XL/2: the network of DiT-XL/2, guided in every step."""
    config = preset_config("dit-xl/2", latent=(32, 32), stages=1, channels=4, classes=1000, image=(256, 256))
    parts = sampling_flops(config, SamplingConfig(steps=(steps,), guidance=(1.5,), solver="euler"))
    blocks = config.head_depth * 18 * config.width**2
    return Computed("SiT-XL/2", f"{steps} steps, guided", blocks, 0, sum(parts["head"]))


def mar(name: str, width: int, depth: int, head_width: int, head_depth: int, steps: int) -> Computed:
    """MAR: masked encoder and decoder of ``depth`` blocks each, cosine schedule over 256 tokens, 100 diffusion steps
    for each token by a perceptron head; guided."""
    encoder = decoder = 0.0
    for i in range(steps):
        known = 256 - math.floor(256 * math.cos(math.pi / 2 * i / steps))
        encoder += depth * _block(width, known + _MAR_BUFFER, known + _MAR_BUFFER)
        decoder += depth * _block(width, 256 + _MAR_BUFFER, 256 + _MAR_BUFFER)
    head = 256 * 100 * head_depth * 5 * head_width**2
    parameters = 2 * depth * 12 * width**2 + head_depth * 5 * head_width**2
    return Computed(name, f"{steps} x 100, guided", parameters, round(4 * (encoder + decoder)), 4 * head)


def var(depth: int) -> Computed:
    """VAR: ``depth`` blocks of width 64 ``depth`` over ten scales, cached; guided."""
    width, tokens = 64 * depth, sum(side**2 for side in _VAR_SIDES)
    modulation = len(_VAR_SIDES) * 6 * width**2
    trunk = depth * (_cached(width, _VAR_SIDES) + modulation)
    head = tokens * width * _VAR_VOCABULARY
    return Computed(f"VAR-d{depth}", "10 scales, guided", 18 * depth * width**2, round(4 * trunk), 4 * head)


def flowar(name: str, width: int, depth: int, head_width: int, head_depth: int, *, cross: bool, steps: int) -> Computed:
    """FlowAR: ``depth`` cached blocks over five scales, then a joint flow head of ``steps`` Euler steps in each,
    modulated per token. Its sampler carries both halves of the doubled batch through every step, also where guidance
    does not act, and its flag of 25 steps makes 24 (25 times, the last of which is the end)."""
    sides, w = _FLOWAR_SIDES, head_width
    trunk = depth * (_cached(width, sides) + len(sides) * 6 * width**2)
    step = 0.0
    for n in (side**2 for side in sides):
        block = _block(w, n, n) + (3 * w**2 + 3 * n * w**2 if cross else 6 * n * w**2)
        if cross:
            block += n * (2 * w**2 + 2 * width * w) + 2 * n * n * w
        step += head_depth * block
    per_head_block = (12 + 6 + 2) * w**2 + 2 * width * w if cross else 18 * w**2
    parameters = depth * 18 * width**2 + head_depth * per_head_block
    return Computed(name, f"5 x {steps} steps, guided", parameters, round(4 * trunk), round(4 * steps * step))


def published() -> list[Computed]:
    """SiT, MAR, VAR and FlowAR in the sizes and settings that their authors report."""
    systems = [
        mar(f"MAR-{size}", width, depth, head_width, head_depth, steps)
        for size, width, depth, head_width, head_depth in (
            ("B", 768, 12, 1024, 6),
            ("L", 1024, 16, 1280, 8),
            ("H", 1280, 20, 1536, 12),
        )
        for steps in (64, 256)
    ]
    systems.append(sit(250))
    systems += [var(depth) for depth in (16, 20, 24, 30)]
    systems += [
        flowar("FlowAR-S", 768, 12, 1024, 2, cross=False, steps=24),
        flowar("FlowAR-L", 1024, 16, 1024, 12, cross=True, steps=24),
        flowar("FlowAR-H", 1536, 30, 1536, 12, cross=True, steps=50),
    ]
    return systems
