"""The stage loop: noise -> maps y_1 .. y_S, coarse to fine. All random numbers come in as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecar.config import SamplingConfig
from ecar.flow.guidance import guide_halves
from ecar.flow.solvers import Velocity, get_solver, uniform_grid
from ecar.model import StageModel
from ecar.sampling.noise import StageNoise
from ecar.stages import Stage, data_from_end, jump


@dataclass(frozen=True)
class StageResult:
    """A finished stage: ``y`` is y_k (B, C, h_k, w_k), partly denoised; ``z`` the model's estimate of the data z_k."""

    stage: Stage
    y: Tensor
    z: Tensor


StageCallback = Callable[[StageResult], None]


def check_settings(settings: SamplingConfig, stages: int) -> None:
    """ValueError unless steps, guidance, solver and guidance_on are usable with ``stages`` stages."""
    get_solver(settings.solver)
    if len(settings.steps) != stages or any(s < 1 for s in settings.steps):
        raise ValueError(f"steps needs {stages} positive numbers, one per stage; got {settings.steps}")
    if len(settings.guidance) != stages:
        raise ValueError(f"guidance needs one number or {stages}, one per stage; got {settings.guidance}")
    if any(not 0 <= g <= 100 for g in settings.guidance):
        raise ValueError(f"guidance must be in 0..100 (1 is off), got {settings.guidance}")
    if settings.guidance_on not in ("velocity", "tokens"):
        raise ValueError(f"guidance_on must be velocity or tokens, got {settings.guidance_on!r}")


@torch.no_grad()
def sample_latents(
    model: StageModel,
    labels: Tensor,
    noise: list[StageNoise],
    settings: SamplingConfig,
    on_stage: StageCallback | None = None,
    known: Sequence[Tensor] = (),
) -> Tensor:
    """Sample unit-scale latents.

    Args:
        model: weights and plan.
        labels: (B,) class ids; ``model.config.null_class`` is unconditional.
        noise: per stage, see ``draw_noise``.
        settings: steps, guidance and solver per stage.
        on_stage: called after each stage.
        known: y_1 .. y_j, each (B, C, h_k, w_k): these stages are taken as given instead of sampled.

    Returns:
        (B, C, h_S, w_S), float32.
    """
    check_settings(settings, len(model.plan))
    solver, batch, y = get_solver(settings.solver), len(labels), None
    guided_until = max((k + 1 for k, g in enumerate(settings.guidance) if g != 1), default=0)
    null = torch.full_like(labels, model.config.null_class)
    # While guidance is on, the batch is doubled: conditional rows first.
    rows = torch.cat([labels, null]) if guided_until else labels
    cache = model.transformer.new_cache(len(rows), labels.device, model.dtype)
    for stage, draws in zip(model.plan, noise, strict=True):
        if guided_until == stage.index:
            rows = labels
            cache.first_rows(batch)
        x, context = draws.fresh.to(labels.device), None
        if y is not None:
            assert draws.context is not None
            context = y + model.config.context_noise * draws.context.to(labels.device)
            context = context.repeat(len(rows) // batch, 1, 1, 1)
            x = jump(stage, y, x)
        tokens = model.transformer.step(stage, context, rows, cache)  # M_k
        scale = settings.guidance[stage.index]
        if stage.index < len(known):
            y = known[stage.index]
            continue
        velocity = stage_velocity(model, stage, tokens, rows, batch, scale, settings.guidance_on)
        y = solver(velocity, x, uniform_grid(settings.steps[stage.index]))
        if on_stage is not None:
            z = y if stage.end == 1 else data_from_end(stage, y, velocity(y, 1.0))
            on_stage(StageResult(stage, y, z))
    assert y is not None
    return y


def stage_velocity(
    model: StageModel, stage: Stage, tokens: Tensor, rows: Tensor, batch: int, scale: float, guidance_on: str
) -> Velocity:
    """The guided velocity of one stage as a function of (x, t).

    Guidance on velocities takes two head passes a step (here: one of twice the rows); on the token maps, one.
    """
    if scale != 1 and guidance_on == "tokens":
        tokens = guide_halves(tokens, scale)
    elif scale == 1:
        tokens = tokens[:batch]
    copies = len(tokens) // batch
    embedded, labels = model.head.embed_tokens(stage, tokens), rows[: len(tokens)]

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((1,), t, device=x.device)
        v = model.velocity(stage, x.repeat(copies, 1, 1, 1), times, embedded, labels)
        return v if copies == 1 else guide_halves(v, scale)

    return velocity
