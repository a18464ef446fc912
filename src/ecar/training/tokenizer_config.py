"""Options of ``ecar tokenizer``, in groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

from ecar.data.reading import ReadOptions
from ecar.files.options import flag, from_flat, option
from ecar.training.engine.options import RateOptions, RunOptions


@dataclass(frozen=True, kw_only=True)
class ImageOptions(ReadOptions):
    """The images and how they are read."""

    data: tuple[str, ...]
    """Folder of images, WebDataset tars, parquet file or folder, or Hub data set id; several are read as one."""
    resolution: int = 32
    """Side of the training images in pixels."""
    crop: int | None = None
    """Train on random squares of this side: a convolutional autoencoder learns on 128 pixels and decodes any size.
    Default: whole images."""
    max_images: int | None = None
    """Use this many images only, chosen at random."""

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # one name stands for itself
            object.__setattr__(self, "data", (self.data,))
        if not self.data:
            raise ValueError("--data takes at least one name")
        if self.resolution < 1:
            raise ValueError(f"--resolution must be at least 1, got {self.resolution}")
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"--crop must be at least 1, got {self.crop}")
        if self.side > self.resolution:
            raise ValueError(f"--crop {self.side} is larger than --resolution {self.resolution}")

    @property
    def side(self) -> int:
        """Side in pixels of what a step trains on."""
        return self.resolution if self.crop is None else self.crop


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The network as resolved; fields as in ``NetworkOptions``."""

    channels: int = 4
    factor: int = 4
    widths: tuple[int, ...] = (32, 64, 128)
    depth: int = 2
    patch: int = 1

    def __post_init__(self) -> None:
        for name in ("channels", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ValueError(f"--factor must be a power of two of at least 2, got {self.factor}")
        if self.patch < 1 or self.patch & (self.patch - 1) or self.patch >= self.factor:
            raise ValueError(f"--patch must be a power of two below --factor {self.factor}, got {self.patch}")
        levels = (self.factor // self.patch).bit_length()
        if len(self.widths) != levels or min(self.widths) < 1:
            raise ValueError(
                f"--widths needs {levels} positive entries for --factor {self.factor} and --patch {self.patch}, "
                f"got {self.widths}"
            )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The autoencoder."""

    init_from: str | None = option(None, free=True)  # checkpoints know its fingerprint
    """Start from this tokenizer (a folder that this command wrote, or MODEL/tokenizer), with its sizes."""
    freeze_encoder: bool = False
    """Train the decoder only, with --init-from: latents stay what they are, and models of them take the new decoder
    (--decoder)."""
    channels: int | None = None
    """Latent channels; default 4."""
    factor: int | None = None
    """Pixels per latent position, along each side; a power of two; default 4."""
    widths: tuple[int, ...] = ()
    """Channels per level from the image side inwards, log2(factor / patch) + 1 of them; default 32 64 128."""
    depth: int | None = None
    """Residual blocks per decoder level; default 2."""
    patch: int | None = None
    """Side of the squares of pixels that the first and last convolution take at once; default 1. 4 for photographs of
    256 pixels: full size is where most time goes."""

    def __post_init__(self) -> None:
        if self.freeze_encoder and self.init_from is None:
            raise ValueError("--freeze-encoder needs --init-from, the tokenizer whose latents stay")
        if self.init_from is None:
            self.resolve()

    def resolve(self, given: Sizes | None = None) -> Sizes:
        """The sizes that were asked for, or else those of ``given``, or the defaults.

        Raises:
            ValueError: other sizes than those of ``given``, or sizes that make no network.
        """
        asked = {f.name: getattr(self, f.name) for f in fields(Sizes) if getattr(self, f.name) not in (None, ())}
        if given is None:
            return Sizes(**asked)
        for name, size in asked.items():
            if size != getattr(given, name):
                own = getattr(given, name)
                raise ValueError(f"--init-from {self.init_from} has {name} {own}, not {size}: leave out {flag(name)}")
        return given


@dataclass(frozen=True, kw_only=True)
class TermOptions:
    """The terms of the loss."""

    perceptual: float = 0.5
    """Weight of the perceptual term; 0 is off (and needs no EfficientNet weights)."""
    adversarial: float = 0.0
    """Weight of the adversarial term, for sharp images; 0 is off. For an autoencoder that is good already: with
    --init-from, and 1."""
    scale_consistency: float = 0.5
    """Weight of the pooled terms; 0 is off."""
    scale_levels: int = 1
    """How many poolings to ask consistency for: stages - 1."""
    latent_noise: float = 0.1
    """Standard deviation of the noise on unit-scale latents."""

    def __post_init__(self) -> None:
        for term in fields(self):
            if not 0 <= getattr(self, term.name) < math.inf:
                raise ValueError(f"{flag(term.name)} must not be negative, got {getattr(self, term.name)}")


@dataclass(frozen=True, kw_only=True)
class TokenizerRate(RateOptions):
    """The optimizer and its learning rate."""

    lr: float = option(2e-3, free=True)
    """Peak learning rate (Muon's updates are scaled to AdamW's); 5% warm-up, cosine decay to 1%."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRun(RunOptions):
    """The run: how long, where, and what it writes."""

    max_steps: int = option(4000, free=True)
    """Optimizer steps."""
    save_every: int = option(500, free=True)
    """Steps between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train the convolutional autoencoder; the same command again resumes."""

    data: ImageOptions
    """The images."""
    network: NetworkOptions = field(default_factory=NetworkOptions)
    """The network."""
    loss: TermOptions = field(default_factory=TermOptions)
    """The terms of the loss."""
    optimizer: TokenizerRate = field(default_factory=TokenizerRate)
    """The optimizer and its learning rate."""
    run: TokenizerRun
    """How long to train, and what to write."""

    def __post_init__(self) -> None:
        if self.network.init_from is None:
            self.check_side(self.network.resolve().factor)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From options by their names, without groups."""
        return from_flat(cls, options)

    def check_side(self, factor: int) -> None:
        """ValueError unless the latents of the images pool as often as asked for."""
        smallest = factor * 2 ** (self.loss.scale_levels if self.loss.scale_consistency else 0)
        if self.data.side % smallest:
            name = "--resolution" if self.data.crop is None else "--crop"
            raise ValueError(f"{name} {self.data.side} does not divide by {smallest} (factor and pooling levels)")
