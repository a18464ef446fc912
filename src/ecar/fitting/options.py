"""Options of ``ecar fit``: what is left open is chosen from the data, the machine and the time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

from ecar.data.reading import ReadOptions
from ecar.files.options import from_flat, option

EFFORTS = {"quick": 10.0, "good": 60.0, "best": 480.0}  # minutes
NEW = "new"  # as a tokenizer: one that is trained from the start


@dataclass(frozen=True, kw_only=True)
class Photographs(ReadOptions):
    """The pictures."""

    data: str
    """Folder of images (class subfolders give labels), WebDataset tars, parquet file or folder, or Hub data set id."""
    flip: bool = True
    """Train on mirrored pictures too. --no-flip for letters, and other things with a direction."""
    held_out: int | None = None
    """Pictures that are not trained on, to judge by. Default: 5%, at least 8, at most 500 and 50 + 5
    a minute."""

    def __post_init__(self) -> None:
        if self.held_out is not None and self.held_out < 4:
            raise ValueError(f"--held-out must be at least 4, got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """The time, and where the work is done."""

    out: str
    """Folder of the model. The same command again goes on."""
    config: str | None = option(None, free=True)
    """Recipe with all that was chosen (TOML): the recipe.toml of another model. Flags win over it."""
    minutes: float | None = None
    """Time for everything; default: that of --effort."""
    effort: str | None = None
    """quick (10 minutes), good (60, the default) or best (480)."""
    seed: int = 0
    """Seed of weights, data order, noise and samples."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""

    def __post_init__(self) -> None:
        if self.effort is not None and self.effort not in EFFORTS:
            raise ValueError(f"--effort must be one of {', '.join(EFFORTS)}, got {self.effort!r}")
        if self.effort is not None and self.minutes is not None:
            raise ValueError("--minutes and --effort both say how long: give one of them")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"--minutes must be positive, got {self.minutes}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be in 0..2^31-1, got {self.seed}")

    @property
    def seconds(self) -> float:
        """For everything."""
        return 60 * (self.minutes if self.minutes is not None else EFFORTS[self.effort or "good"])


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is chosen where it is left out; a recipe has all of it."""

    images: int | None = None
    """Pictures to train on, at most. Default: what can be encoded in a sixth of the time."""
    resolution: int | None = None
    """Side of the images in pixels. Default: by the size of the pictures, 32 to 256."""
    tokenizer: str | None = None
    """Tokenizer as of ecar train, or new. Default: the one that gives held-out pictures back best."""
    tokenizer_steps: int | None = None
    """Steps to train the tokenizer on these pictures; 0: take it as it is."""
    start: str | None = None
    """Model to start from, or none. Default: a bundled one of the same latents, where it is ahead after a trial."""
    lr: float | None = None
    """Peak learning rate of the training."""
    preset: str | None = None
    """Model: nano, ti, s, b, l or xl, or sizes such as 192x6x1+6; a patch size may follow, as in s/2."""
    stages: int | None = None
    """Number of stages."""
    batch_size: int | None = None
    """Images per training step."""
    max_steps: int | None = None
    """Training steps at most: the training ends before where the held-out loss turns."""
    compile: int | None = None
    """1: compile the model before training; 0: do not."""
    scales: int | None = None
    """Scales of guidance to compare by samples, of 1, 2, 3.5 and 1.4; 1: none are compared."""
    guidance: float | None = None
    """Scale of guidance where none are compared."""
    student_steps: int | None = None
    """Steps to distil guidance; 0: leave guidance as it is."""
    samples: int | None = None
    """Samples to judge; 0: judge nothing."""
    critic_images: int | None = None
    """Images to fit a critic to, and as many samples; 0: no critic."""

    def __post_init__(self) -> None:
        least = {
            "images": 1, "resolution": 8, "tokenizer_steps": 0, "stages": 1, "batch_size": 1,
            "max_steps": 1, "compile": 0, "scales": 1, "student_steps": 0, "samples": 0, "critic_images": 0,
        }  # fmt: skip
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"`{name}` must be at least {value}, got {given}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive, got {self.lr}")
        if self.guidance is not None and not 0 < self.guidance < math.inf:
            raise ValueError(f"--guidance must be positive, got {self.guidance}")
        if self.scales is not None and self.scales > 4:
            raise ValueError(f"`scales` must be at most 4, got {self.scales}")
        if self.samples == 1 or (self.critic_images or 100) < 100:
            raise ValueError("`samples` must be 0 or at least 2, and `critic_images` 0 or at least 100")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Train, evaluate and report a model of a folder of pictures in a given time: ecar fit PHOTOS --out MODEL."""

    photographs: Photographs
    """What is read."""
    allowance: Allowance
    """How long, and where to."""
    choices: Choices = field(default_factory=Choices)
    """What may be left open."""

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From options by their names, without groups."""
        return from_flat(cls, options)
