"""What the engine has to be told of what is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

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


class Task(ABC):
    """What a run learns: ``Trainer`` does everything else. A context manager, for what it holds open.

    Attributes:
        module: what is trained, averaged and saved.
        names: of the mean losses.
        rows: how many images of a batch train each part of the module.
    """

    module: nn.Module
    names: tuple[str, ...]
    rows: tuple[int, ...]

    def wrapped(self) -> tuple[nn.Module, list[nn.Module], bool]:
        """The module that several processes wrap, its parts whose weights may be whole only while they compute, and
        whether some weights may get no gradient."""
        return self.module, [], False

    @abstractmethod
    def optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
        """Those that take the engine's steps, and others whose state is saved too."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """Learning rate at a step, from 1."""

    @abstractmethod
    def draw(self, step: int) -> Any:
        """The batch of a step: a function of seed and step, so that a resumed run sees the same."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Any, part: Part) -> Losses:
        """Losses of a part of a batch, through the (wrapped) module."""

    def updated(self, updates: int, rests: list[Any]) -> list[float]:  # noqa: ARG002
        """After an update, the first with ``updates`` 1: statistics, say. Returns means of further ``names``."""
        return []

    @abstractmethod
    def line(self, means: list[float]) -> dict[str, float]:
        """Means over some steps as a line of the log; ``loss`` is among them."""

    @abstractmethod
    def rows_of(self, steps: range) -> dict[int, list[int]]:
        """Rows of the data that the batches of some steps have."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """For the log: ``options``, ``data``, ``parameters``, ``images_in_data`` (0: none), ``bad_images_skipped``."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a checkpoint is to say about itself."""

    @abstractmethod
    def check(self, record: dict[str, Any]) -> None:
        """ValueError where the record of the checkpoint to resume is of other data."""

    @abstractmethod
    def picture(self, weights: dict[str, Tensor], step: int) -> Path:
        """A picture of what averaged weights do."""

    def begin(self, first: bool) -> dict[str, Any]:  # noqa: ARG002
        """Say what the run is, on the first of its starts in more words; a line for the log, or nothing."""
        return {}

    def ready(self) -> None:  # noqa: B027
        """The weights are those to go on with: compile, say."""

    def saving(self, step: int) -> None:  # noqa: B027
        """A checkpoint is to be written now."""

    def tensors(self) -> dict[str, Tensor]:
        """What is to be saved beside weights, averages and optimizers."""
        return {}

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:  # noqa: B027
        """The inverse of ``tensors``, after so many updates."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027
        """Holds nothing open."""
