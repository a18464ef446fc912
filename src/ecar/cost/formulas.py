"""FLOPs in closed form (2 per multiply-accumulate): what the flop counter counts, without running anything.

D width, n tokens of a stage, m keys, C latent channels, h hidden width of the feed-forward. Per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ecar.config import ModelConfig, SamplingConfig
from ecar.network.block import hidden_width
from ecar.network.trunk import FOURIER_BANDS
from ecar.sampling.solvers import uniform_grid
from ecar.stages import make_plan

_DIT_TIME_FEATURES = 256


def block_flops(width: int, tokens: int, keys: int, groups: int = 1) -> int:
    """A block of trunk or head: qkv and output, scores and values, SwiGLU, modulation of ``groups`` rows."""
    attention = 4 * tokens * width**2 + 2 * tokens * keys * width
    mlp = 3 * tokens * width * hidden_width(width)
    return 2 * (attention + mlp + groups * 6 * width**2)


def trunk_flops(config: ModelConfig) -> list[int]:
    """The trunk with its cache, per stage."""
    if not config.has_trunk:
        return [0]
    result, seen = [], 0
    for stage in make_plan(config.stages, config.patch):
        n = stage.tokens
        seen += n
        embed = 2 * n * config.width * (4 * FOURIER_BANDS + (config.channels * config.patch**2 if stage.index else 0))
        result.append(embed + config.trunk_depth * block_flops(config.width, n, seen))
    return result


def head_flops(config: ModelConfig) -> list[int]:
    """One evaluation of the head (or of DiT), per stage."""
    width, result = config.width, []
    for stage in make_plan(config.stages, config.patch):
        n = stage.tokens
        ends = 2 * 2 * n * width * config.channels * config.patch**2  # map in and out
        if not config.has_trunk:
            embedder = 2 * (_DIT_TIME_FEATURES * width + width**2)  # one per block, and once more for the output
            block = 2 * (12 * n * width**2 + 2 * n**2 * width + 6 * width**2) + embedder
            result.append(ends + config.head_depth * block + embedder + 2 * 2 * width**2)
        else:
            time = 2 * 2 * width**2
            result.append(ends + time + config.head_depth * block_flops(width, n, n) + 2 * 2 * width**2)
    return result


def token_flops(config: ModelConfig) -> list[int]:
    """Embedding M_k for the head, once per stage."""
    if not config.has_trunk:
        return [0]
    embed = [2 * s.tokens * config.width**2 for s in make_plan(config.stages, config.patch)]
    return [own + positions for own, positions in zip(embed, position_flops(config), strict=True)]


def position_flops(config: ModelConfig) -> list[int]:
    """Embedding the positions of a stage, which all rows of a batch share; trunk and head do so each."""
    if not config.has_trunk:
        return [0]
    return [2 * s.tokens * config.width * 4 * FOURIER_BANDS for s in make_plan(config.stages, config.patch)]


def modulation_flops(config: ModelConfig) -> int:
    """Of one time, in the head: ECAR's is computed once where a solver asks twice for a time, DiT's is not."""
    return 0 if not config.has_trunk else 2 * config.width**2 * (2 + 6 * config.head_depth + 2)


def evaluations(steps: int, solver: str) -> int:
    """Head evaluations of a stage: Heun takes two a step, one in the last of several."""
    return steps if solver != "heun" else max(2, 2 * steps - 1)


def evaluation_times(steps: int, solver: str) -> list[float]:
    """The times of a stage at which the solver asks for a velocity."""
    grid = uniform_grid(steps)
    if solver != "heun":
        return grid[:-1]
    return [t for pair in pairwise(grid) for t in pair][: evaluations(steps, solver)]


def sampling_flops(config: ModelConfig, settings: SamplingConfig) -> dict[str, list[int]]:
    """``trunk`` and ``head`` (with guidance) of one image, per stage; the decoder is not in it."""
    guided_until = max((k + 1 for k, g in enumerate(settings.guidance) if g != 1), default=0)
    positions = position_flops(config)
    trunk = [cost + (cost - positions[k] if k < guided_until else 0) for k, cost in enumerate(trunk_flops(config))]
    head = []
    for k, (step, embed) in enumerate(zip(head_flops(config), token_flops(config), strict=True)):
        copies = 2 if settings.guidance[k] != 1 else 1
        start = settings.guidance_from[k] if settings.guidance_from else 0.0
        times = evaluation_times(settings.steps[k], settings.solver)
        passes, distinct = (sum(copies if t >= start else 1 for t in some) for some in (times, set(times)))
        again = (passes - distinct) * modulation_flops(config)
        # No step begins at 1: that time is embedded once for both halves.
        if copies == 2 and config.has_trunk and 1.0 in times:
            again += 2 * 2 * config.width**2
        head.append(copies * embed - (copies - 1) * positions[k] + passes * step - again)
    return {"trunk": trunk, "head": head}


def training_flops(config: ModelConfig, share: Sequence[float]) -> int:
    """One image of a large batch, forward and backward; stage k trains on ``share[k]`` of the images.

    Backward is twice forward, but for input layers (no gradient of the input). Positions are embedded once per batch.
    """
    plan, width, whole, inputs = make_plan(config.stages, config.patch), config.width, 0.0, 0.0
    for stage, step, embed in zip(plan, head_flops(config), token_flops(config), strict=True):
        positions = position_flops(config)[stage.index]
        map_in = 2 * stage.tokens * width * config.channels * config.patch**2
        whole += share[stage.index] * (step + embed - positions - map_in)
        inputs += share[stage.index] * map_in
        if config.has_trunk:
            # Images that train no finer stage than this one share one masked pass: it computes every score.
            rows = share[stage.index] - (share[stage.index + 1] if stage.index + 1 < len(plan) else 0.0)
            seen = plan[: stage.index + 1]
            tokens = sum(s.tokens for s in seen)
            whole += rows * config.trunk_depth * block_flops(width, tokens, tokens, len(seen))
            inputs += rows * 2 * width * config.channels * config.patch**2 * (tokens - plan[0].tokens)
    return round(3 * whole + 2 * inputs)
