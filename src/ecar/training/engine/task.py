"""What the engine has to be told of what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ecar.processes.world import Part


@dataclass(frozen=True)
class Losses:
    """Losses of a micro-batch.

    Attributes:
        total: what is descended.
        means: a number for each of the task's ``names``, detached.
        rest: what ``Task.updated`` is to get after the update.
    """

    total: Tensor
    means: Tensor
    rest: Any = None


class Watch(Protocol):
    """Looks at averaged weights now and then."""

    @property
    def every(self) -> int:
        """Steps from one look to the next."""

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Numbers for the log; asked for on rank 0 only."""

    @property
    def turned(self) -> bool:
        """Whether the run should end, by what the log shows; asked for on rank 0 only."""


class Task(Protocol):
    """What a run learns: ``Trainer`` does everything else."""

    @property
    def module(self) -> nn.Module:
        """What is trained, averaged and saved."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the mean losses."""

    @property
    def rows(self) -> tuple[int, ...]:
        """How many images of a batch train each part of the module."""

    def wrapped(self) -> tuple[nn.Module, list[nn.Module], bool]:
        """The module that several processes wrap, its parts whose weights may be whole only while they compute, and
        whether some weights may get no gradient."""

    def optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
        """Those that take the engine's steps, and others whose state is saved too."""

    def rate(self, step: int) -> float:
        """Learning rate at a step, from 1."""

    def check(self, record: dict[str, Any]) -> None:
        """ValueError where the record of the checkpoint to resume is of other data."""

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """The inverse of ``tensors``, after so many updates."""

    def ready(self) -> None:
        """The weights are those to go on with: compile, say."""

    def begin(self, first: bool) -> dict[str, Any]:
        """Say what the run is, on the first of its starts in more words; a line for the log, or nothing."""

    def about(self) -> dict[str, Any]:
        """For ``run_record``: options, data, sizes."""

    def draw(self, step: int) -> Any:
        """The batch of a step: a function of seed and step, so that a resumed run sees the same."""

    def losses(self, module: nn.Module, batch: Any, part: Part) -> Losses:
        """Losses of a part of a batch, through the (wrapped) module."""

    def updated(self, updates: int, rests: list[Any]) -> list[float]:
        """After an update, the first with ``updates`` 1: statistics, say. Returns means of further ``names``."""

    def line(self, means: list[float]) -> dict[str, float]:
        """Means over some steps as a line of the log; ``loss`` is among them."""

    def rows_of(self, steps: range) -> dict[int, list[int]]:
        """Rows of the data that the batches of some steps have."""

    def saving(self, step: int) -> None:
        """A checkpoint is to be written now."""

    def tensors(self) -> dict[str, Tensor]:
        """What is to be saved beside weights, averages and optimizers."""

    def record(self) -> dict[str, Any]:
        """What a checkpoint is to say about itself."""

    def picture(self, weights: dict[str, Tensor], step: int) -> Path:
        """A picture of what averaged weights do."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...
