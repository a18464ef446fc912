"""What travels through the engine: rows (one image each) and the events that they send back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from ecar.config import SamplingConfig
from ecar.sampling.canvas import Canvas
from ecar.sampling.edit import Edit
from ecar.sampling.known import Known
from ecar.sampling.loop import Rows
from ecar.sampling.noise import StageNoise
from ecar.serving.previews import Point

Key = tuple[int, SamplingConfig]  # rows of the same stage and settings are computed together


class EngineError(Exception):
    """Why a row or a request gets no image.

    Attributes:
        status: HTTP status.
        code: machine-readable reason.
        retry_after: seconds after which another try makes sense; None: no try does.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


@dataclass(frozen=True)
class Preview:
    """The image so far: ``number`` counts the previews of a row from 0, ``stage`` from 1."""

    number: int
    stage: int
    image: Image.Image


@dataclass(frozen=True)
class Finished:
    """The image, and the seed that drew it: of candidates, that of the one chosen."""

    image: Image.Image
    seed: int


@dataclass(frozen=True)
class Failed:
    """No image, and why."""

    error: EngineError


Event = Preview | Finished | Failed


@dataclass(eq=False)
class Group:
    """Candidates for one image, drawn as rows of their own.

    Attributes:
        seed: of the image.
        seeds: of its candidates.
        decoded: by seed, (3, H, W) in [-1, 1]: those that are finished.
    """

    seed: int
    seeds: list[int]
    decoded: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def complete(self) -> bool:
        """All are finished."""
        return len(self.decoded) == len(self.seeds)


@dataclass(eq=False)
class Redraw:
    """A picture of which a part is drawn anew, for all rows of a request.

    Attributes:
        canvas: picture and mask, made before the engine hears of it.
        strength: in (0, 1], how much is drawn.
        edit: made of them in the engine's thread, once.
    """

    canvas: Canvas
    strength: float
    edit: Edit | None = field(default=None, repr=False)


@dataclass(eq=False)
class Row:
    """One image that was asked for, or a candidate for one.

    Attributes:
        label: class id; the null class is unconditional.
        seed: of its noise, as in ``Pipeline``.
        settings: steps, guidance and solver.
        emit: called in the engine's thread with each event of this row; the last is ``Finished`` or ``Failed``.
        previews: points at which it wants to be seen.
        deadline: on the clock of ``time.monotonic``.
        cancelled: set by whoever asked; the row leaves at the next stage boundary, without an event.
        group: of which it is a candidate; the last of a group to finish sends the ``Finished`` of the image.
        redraw: the picture that it edits.
        known: of it, stage by stage.
    """

    label: int
    seed: int
    settings: SamplingConfig
    emit: Callable[[Event], None]
    previews: tuple[Point, ...] = ()
    deadline: float = float("inf")
    cancelled: bool = False
    group: Group | None = None
    redraw: Redraw | None = None
    known: list[Known] = field(default_factory=list, repr=False)
    noise: list[StageNoise] = field(default_factory=list, repr=False)
    queued: float = field(default_factory=time.monotonic)
    previewed: int = 0

    def show(self, stage: int, image: Image.Image) -> None:
        """Send a preview of ``stage`` (from 0)."""
        self.emit(Preview(self.previewed, stage + 1, image))
        self.previewed += 1


@dataclass
class Chunk:
    """Rows that left a stage together: ``batch`` is their state, row by row that of ``members``."""

    members: list[Row]
    batch: Rows

    def select(self, rows: list[int]) -> Chunk:
        """Some of the rows; itself where all are meant."""
        if len(rows) == len(self.members):
            return self
        return Chunk([self.members[i] for i in rows], self.batch.select(rows))

    @staticmethod
    def join(chunks: list[Chunk]) -> Chunk:
        """Chunks of the same key as one."""
        return Chunk([row for c in chunks for row in c.members], Rows.join([c.batch for c in chunks]))
