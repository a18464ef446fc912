"""Random numbers of a training step: a function of (seed, step), so that a resumed run sees the same."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ecar.data.latents import LatentTable
from ecar.data.order import batch_indices, derive_seed
from ecar.stages import Stage
from ecar.training.config import Training
from ecar.training.distill import grid_times
from ecar.training.loss import Draws

UNIFORM_SHARE = 0.2  # of times; the rest is logit-normal
LABEL_DROPOUT = 0.1  # labels replaced by the null class, for guidance (2207.12598)


def training_times(stages: int, batch: int, generator: torch.Generator) -> Tensor:
    """Times (S, batch) in [0, 1]: logit-normal(0, 1) (2403.03206), a share uniform to see both ends."""
    shape = (stages, batch)
    normal = torch.randn(shape, generator=generator).sigmoid()
    uniform = torch.rand(shape, generator=generator)
    choice = torch.rand(shape, generator=generator) < UNIFORM_SHARE
    return torch.where(choice, uniform, normal)


def draw_batch(
    config: Training, table: LatentTable, plan: tuple[Stage, ...], null_class: int, step: int
) -> tuple[Tensor, Tensor, Draws]:
    """Latents (B, C, h, w) float32, labels (B,) with dropout applied, and the noise and times of a step (from 1)."""
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, 2, step))
    rows = batch_indices(len(table), config.run.batch_size, config.run.seed, step - 1)
    side = torch.randint(table.mirrors, (config.run.batch_size,), generator=generator)
    latents = table.batch(side, rows, derive_seed(config.run.seed, 3, step))
    dropped = torch.rand(config.run.batch_size, generator=generator) < LABEL_DROPOUT
    labels = torch.where(dropped, null_class, table.labels[rows])
    batch, channels = latents.shape[:2]
    draws, to = draw_noise(config, plan, batch, channels, generator), config.run.device
    return latents.to(to), labels.to(to), draws.to(to)


def draw_noise(
    config: Training, plan: tuple[Stage, ...], batch: int, channels: int, generator: torch.Generator
) -> Draws:
    """Noise and times of ``batch`` images, on the CPU."""
    shapes = [(batch, channels, *stage.side) for stage in plan]
    noise = [torch.randn(shape, generator=generator) for shape in shapes]
    context = [torch.randn(shape, generator=generator) for shape in shapes[:-1]]
    if config.distill.distill_steps:
        times = grid_times(config.distill.distill_steps, plan, batch, generator)
    else:
        times = training_times(len(config.stages.stages), batch, generator)
    return Draws(noise, context, times)


class BatchesAhead:
    """``draw_batch`` of the steps in turn, one step ahead on a thread: a GPU would wait for it.

    Args:
        config, table, plan, null_class: as in ``draw_batch``.
        ahead: whether there is a thread; on CPU it would take a core from the step.
    """

    def __init__(
        self, config: Training, table: LatentTable, plan: tuple[Stage, ...], null_class: int, *, ahead: bool
    ) -> None:
        self._arguments, self._last = (config, table, plan, null_class), config.run.max_steps
        self._pool = ThreadPoolExecutor(1, "draws") if ahead else None
        self._next: tuple[int, Future[tuple[Tensor, Tensor, Draws]]] | None = None

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Draws]:
        """Of ``step``, from 1; other steps than the next one are drawn on the spot."""
        if self._pool is None:
            return draw_batch(*self._arguments, step)
        ahead, self._next = self._next, None
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else draw_batch(*self._arguments, step)
        if step < self._last:
            self._next = step + 1, self._pool.submit(draw_batch, *self._arguments, step + 1)
        return batch
