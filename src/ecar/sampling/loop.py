"""The stage loop: noise -> maps y_1 .. y_S, coarse to fine. All random numbers come in as arguments.

``advance`` does one stage for a batch; ``sample_latents`` calls it S times. A server calls it for rows that came at
different times: between two stages, batches split and join (``Rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ecar.config import SamplingConfig
from ecar.network import StageCache
from ecar.network.model import StageModel
from ecar.sampling.guidance import guide_halves
from ecar.sampling.known import Known
from ecar.sampling.noise import StageNoise
from ecar.sampling.solvers import Velocity, get_solver, uniform_grid
from ecar.stages import Stage, data_from_end, jump


@dataclass(frozen=True)
class StageVelocity:
    """The guided velocity of one stage as a function of (x, t), for a batch of B rows.

    Attributes:
        embedded: token maps as the head reads them, (B, n_k, D); (2 B, n_k, D), conditional rows first, with
            guidance: it takes two head passes a step (here: one of twice the rows).
        labels: class ids of the rows of ``embedded``.
        scale: of guidance; 1 is off.
        start: time from which it acts; before, only the conditional rows are computed.
        conditionings: ``head.conditioning`` of these rows at the times that are known beforehand.
    """

    model: StageModel
    stage: Stage
    embedded: Tensor
    labels: Tensor
    scale: float
    start: float = 0.0
    conditionings: dict[float, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        copies = 1 if self.scale == 1 or t < self.start else 2
        times, known, rows = torch.full((1,), t, device=x.device), self.conditionings.get(t), copies * len(x)
        embedded, labels = self.embedded[:rows], self.labels[:rows]
        v = self.model.velocity(self.stage, x.repeat(copies, 1, 1, 1), times, embedded, labels, known)
        return v if copies == 1 else guide_halves(v, self.scale)

    def select(self, rows: Sequence[int]) -> StageVelocity:
        """The velocity of some of the rows."""
        index = torch.tensor(rows, device=self.labels.device)
        if self.scale != 1:
            index = torch.cat([index, index + len(self.labels) // 2])
        return replace(self, embedded=self.embedded[index], labels=self.labels[index], conditionings={})


@dataclass(frozen=True)
class StageResult:
    """A finished stage: ``y`` is y_k (B, C, h_k, w_k), partly denoised."""

    stage: Stage
    y: Tensor
    velocity: StageVelocity

    @torch.no_grad()
    def data(self, rows: Sequence[int]) -> Tensor:
        """The model's estimate of the data z_k of some of the rows; where the stage ends before the data, one more
        velocity of theirs is computed."""
        everything = len(rows) == len(self.y)
        y = self.y if everything else self.y[list(rows)]
        if self.stage.end == 1:
            return y
        velocity = self.velocity if everything else self.velocity.select(rows)
        return data_from_end(self.stage, y, velocity(y, 1.0))


StageCallback = Callable[[StageResult], None]
VelocityCallback = Callable[[Stage, Tensor, float, Tensor], None]


@dataclass
class Rows:
    """A batch between two stages: all that the next stage needs.

    Attributes:
        labels: (B,) class ids.
        cache: what the trunk remembers: B rows, or 2 B (unconditional rows behind) while guidance is to come.
        y: y_k of the last finished stage, (B, C, h_k, w_k); None before the first.
        done: number of finished stages.
    """

    labels: Tensor
    cache: StageCache
    y: Tensor | None = None
    done: int = 0

    @classmethod
    def start(cls, model: StageModel, labels: Tensor, settings: SamplingConfig) -> Self:
        """Rows before the first stage."""
        copies = 2 if _guided(settings, 0) else 1
        return cls(labels, model.trunk.new_cache(copies * len(labels), labels.device, model.dtype))

    def select(self, rows: Sequence[int]) -> Rows:
        """Some of the rows, copied."""
        index = torch.tensor(rows, device=self.labels.device)
        batch = len(self.labels)
        places = torch.cat([index + start for start in range(0, self.cache.rows, batch)])
        y = None if self.y is None else self.y[index]
        return Rows(self.labels[index], self.cache.select(places), y, self.done)

    @staticmethod
    def join(batches: Sequence[Rows]) -> Rows:
        """Batches of the same stage and settings as one, rows in order; a single one is handed through."""
        if len(batches) == 1:
            return batches[0]
        first = batches[0]
        assert all(b.done == first.done for b in batches), "rows of different stages do not join"
        copies = first.cache.rows // len(first.labels)
        assert all(b.cache.rows == copies * len(b.labels) for b in batches), "guided and plain rows do not join"
        halves = [
            b.cache.select(slice(c * len(b.labels), (c + 1) * len(b.labels))) for c in range(copies) for b in batches
        ]
        maps = [b.y for b in batches if b.y is not None]
        labels = torch.cat([b.labels for b in batches])
        return Rows(labels, StageCache.join(halves), torch.cat(maps) if maps else None, first.done)


def check_settings(settings: SamplingConfig, stages: int) -> None:
    """ValueError unless steps, guidance and solver are usable with ``stages`` stages."""
    get_solver(settings.solver)
    if len(settings.steps) != stages or any(s < 1 for s in settings.steps):
        raise ValueError(f"steps needs {stages} positive numbers, one per stage; got {settings.steps}")
    if len(settings.guidance) != stages:
        raise ValueError(f"guidance needs one number or {stages}, one per stage; got {settings.guidance}")
    if any(not 0 <= g <= 100 for g in settings.guidance):
        raise ValueError(f"guidance must be in 0..100 (1 is off), got {settings.guidance}")
    starts = settings.guidance_from
    if starts and (len(starts) != stages or any(not 0 <= t < 1 for t in starts)):
        raise ValueError(f"guidance_from needs one time in [0, 1) or {stages}, one per stage; got {starts}")


@torch.no_grad()
def advance(
    model: StageModel,
    rows: Rows,
    draws: StageNoise,
    settings: SamplingConfig,
    *,
    known: Known | None = None,
    on_velocity: VelocityCallback | None = None,
) -> StageResult:
    """Do the next stage of ``rows``, in place.

    Args:
        model: weights and plan.
        rows: the batch; ``y``, ``cache`` and ``done`` move on.
        draws: noise of this stage for the rows.
        settings: checked settings, the same for all rows and all their stages.
        known: what of this stage is taken as given instead of sampled; no row depends on what is known of another.
        on_velocity: called with (stage, x, t, v) after each velocity that the solver asks for.
    """
    stage, batch, device = model.plan[rows.done], len(rows.labels), rows.labels.device
    labels = rows.labels
    if _guided(settings, stage.index):  # the batch is doubled: conditional rows first
        labels = torch.cat([labels, torch.full_like(labels, model.config.null_class)])
    elif rows.cache.rows > batch:
        rows.cache.first_rows(batch)
    draws = draws.to(device)
    x, context = draws.fresh, None
    if rows.y is not None:
        assert draws.context is not None
        context = rows.y + model.config.context_noise * draws.context
        context = context.repeat(len(labels) // batch, 1, 1, 1)
        x = jump(stage, rows.y, x)
    tokens = model.trunk.step(stage, context, labels, rows.cache)  # M_k
    velocity = stage_velocity(model, stage, tokens, labels, batch, settings)

    def observed(x: Tensor, t: float) -> Tensor:
        v = velocity(x, t)
        if on_velocity is not None:
            on_velocity(stage, x, t, v)
        return v

    rows.y = _solve(observed, x, settings.steps[stage.index], settings.solver, known and known.to(device))
    rows.done += 1
    return StageResult(stage, rows.y, velocity)


def sample_latents(
    model: StageModel,
    labels: Tensor,
    noise: list[StageNoise],
    settings: SamplingConfig,
    on_stage: StageCallback | None = None,
    known: Sequence[Known] = (),
) -> Tensor:
    """Sample unit-scale latents.

    Args:
        model: weights and plan.
        labels: (B,) class ids; ``model.config.null_class`` is unconditional.
        noise: per stage, see ``draw_noise``.
        settings: steps, guidance and solver per stage.
        on_stage: called after each sampled stage.
        known: of the first stages, what is taken as given instead of sampled.

    Returns:
        (B, C, h_S, w_S), float32.
    """
    check_settings(settings, len(model.plan))
    rows = Rows.start(model, labels, settings)
    noise = [draws.to(labels.device) for draws in noise]  # all before the first stage: a copy waits for what runs
    for stage, draws in zip(model.plan, noise, strict=True):
        given = known[stage.index] if stage.index < len(known) else None
        result = advance(model, rows, draws, settings, known=given)
        if on_stage is not None and not (given and given.complete):
            on_stage(result)
    assert rows.y is not None
    return rows.y


def _solve(velocity: Velocity, x: Tensor, steps: int, solver: str, known: Known | None) -> Tensor:
    """From x_k^0 to y_k, held to what is known. Steps before any row draws are left out."""
    grid = uniform_grid(steps)
    if known is None:
        return get_solver(solver)(velocity, x, grid)
    if known.complete:
        return known.end
    first = known.steps_before(steps)
    if solver != "euler":  # a row must not notice when its neighbours begin: ab2 looks one step back, heun counts steps
        first = max(0, first - 1)
    x = known.at(grid[first]) if first else known.enter(x)
    return get_solver(solver)(velocity, x, grid[first:], known.hold)


def stage_velocity(
    model: StageModel, stage: Stage, tokens: Tensor, labels: Tensor, batch: int, settings: SamplingConfig
) -> StageVelocity:
    """The velocity of a stage from its token maps."""
    scale = settings.guidance[stage.index]
    if scale == 1:
        tokens = tokens[:batch]
    labels, times = labels[: len(tokens)], uniform_grid(settings.steps[stage.index])[:-1]
    start = settings.guidance_from[stage.index] if settings.guidance_from and scale != 1 else 0.0
    conditionings: dict[float, Any] = {}
    for rows, part in ((batch, [t for t in times if t < start]), (len(labels), [t for t in times if t >= start])):
        if part:
            conditionings |= zip(part, model.head.conditionings(stage, part, labels[:rows]), strict=True)
    return StageVelocity(model, stage, model.head.embed_tokens(stage, tokens), labels, scale, start, conditionings)


def _guided(settings: SamplingConfig, stage: int) -> bool:
    """Whether guidance acts in this stage or a later one: only then unconditional rows are carried along."""
    return any(scale != 1 for scale in settings.guidance[stage:])
