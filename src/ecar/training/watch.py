"""Held-out loss: that of the averaged weights on images that are not trained on, with the same noise and times every
time, so that its curve is smooth."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ecar.data.latents import LatentTable
from ecar.data.order import derive_seed
from ecar.devices import mixed_precision
from ecar.files.tensors import write_tensors
from ecar.training.draws import draw_noise
from ecar.training.engine.log import read_log
from ecar.training.generator import Generator
from ecar.training.loss import stage_losses

_COST = 0.05  # of the time of training, at most, about
_FORWARD = 1 / 3  # of a training step's time, per image
_PART = 64  # images in one pass, at most
_BEST = "best.safetensors"  # averaged weights, where there is patience
_RISEN = 0.02  # of its lowest: so far above it the loss may lie. Samples improve beyond the lowest (docs/log.md)


def has_risen(loss: float, lowest: float) -> bool:
    """Whether a held-out loss lies so far above its lowest that a model overfits."""
    return loss > (1 + _RISEN) * lowest


class HeldOutLoss:
    """A ``Watch`` of the held-out loss of ``ecar train``.

    Args:
        task: what is trained.
        table: what is held out.

    Attributes:
        every: steps between two looks: with a line of the log, and seldom enough to cost about 5% of the time.
    """

    def __init__(self, task: Generator, table: LatentTable) -> None:
        self.task, self.labels = task, table.labels
        config, plan, generator = task.config, task.module.plan, torch.Generator().manual_seed(derive_seed(0, 4))
        rows = torch.arange(len(table))
        self.latents = table.batch(torch.zeros_like(rows), rows, derive_seed(0, 5))
        self.draws = draw_noise(config, plan, len(table), task.module.config.channels, generator)
        factor = 2 if config.run.compile else 1  # it is not compiled itself
        least = factor * len(table) * _FORWARD / (_COST * task.rows[-1])
        self.every = config.run.log_every * math.ceil(least / config.run.log_every)

    @property
    def turned(self) -> bool:
        """Whether the log shows a loss that has risen, in as many looks in a row as the run has patience."""
        patience, found = self.task.config.data.patience, self._losses()
        return 0 < patience < len(found) and has_risen(min(found[-patience:]), min(found))

    def best(self) -> dict[str, Tensor] | None:
        """The last averaged weights before the loss had risen, where there is patience."""
        path = self._best_file()
        return load_file(path) if self.task.config.data.patience and path.exists() else None

    def _best_file(self) -> Path:
        return self.task.out / _BEST

    def _losses(self) -> list[float]:
        return [line["val_loss"] for line in read_log(self.task.out) if "val_loss" in line]

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """``val_loss`` and ``val_loss_K`` of each stage for averaged weights, in the units of the training loss."""
        found = self._look(weights)
        if self.task.config.data.patience and not has_risen(found["val_loss"], min(self._losses(), default=math.inf)):
            write_tensors(self._best_file(), {name: tensor.cpu().contiguous() for name, tensor in weights.items()})
        return found

    @torch.no_grad()
    def _look(self, weights: dict[str, Tensor]) -> dict[str, float]:
        config, teacher = self.task.config, self.task.loss.teacher
        model, device = self.task.averaged(weights), config.run.device
        sums = torch.zeros(len(model.plan), dtype=torch.float64)
        size = min(_PART, max(1, config.run.batch_size // config.scale.accumulate))
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            z, labels = self.latents[part].to(device), self.labels[part].to(device)
            with mixed_precision(device, wanted=config.scale.dtype == "bf16"):
                rows = (len(z),) * len(model.plan)
                losses = stage_losses(model, z, labels, self.draws.select(part).to(device), rows, teacher)
            sums += torch.stack([loss.double().sum() for loss in losses]).cpu()
        line = self.task.line((sums / len(self.labels)).tolist())
        return {f"val_{name}": value for name, value in line.items()}
