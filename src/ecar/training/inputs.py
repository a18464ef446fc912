"""Options of what a run starts from: data, a model, a teacher."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ecar.data.reading import ReadOptions
from ecar.files.options import option

OWN = "self:"  # data that are samples of the model itself
_OWN = re.compile(rf"{OWN}(\d+)(?::(\d+(?:\+\d+)*))?")


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadOptions):
    """The data and how they are read."""

    data: str
    """Folder of images (class subfolders give labels), WebDataset tars, parquet file or folder, Hub data set id, or a
    latent cache. self:NUM is NUM samples of --init-from by its own settings, for ecar neon; self:NUM:8+16 draws them in
    8 + 16 steps."""
    tokenizer: str | None = None
    """pixels (default), pixels:FACTOR, photographs (bundled), a bundled model, a folder of `ecar tokenizer`, or a
    diffusers autoencoder (folder or Hub id). A latent cache brings its own."""
    val_data: str | None = option(None, free=True)
    """Log the loss of held-out data too: images or a latent cache, of the classes and tokenizer of --data. Or hold a
    share of --data out, such as 0.05. At most 256 images are used."""
    patience: int = option(0, free=True)
    """End after so many evaluations in a row with a held-out loss of more than 2% above its lowest; 0: never. final is
    then the last average before that, of the first --ema."""
    flip: bool = False
    """Mirror half of the images. Off by default: letters and shoes have a direction."""

    def __post_init__(self) -> None:
        if self.data.startswith(OWN) and not self.own_samples:
            raise ValueError(
                f"--data {self.data}: {OWN} takes a number of samples, and maybe steps, as in {OWN}6144:8+16"
            )
        if self.own_samples and (self.tokenizer or self.flip):
            raise ValueError(f"--data {self.data} goes without --tokenizer and --flip")
        if self.patience < 0 or (self.patience and self.val_data is None):
            raise ValueError(f"--patience must be 0 or more, and needs --val-data; got {self.patience}")
        if self.val_data == "":
            raise ValueError("--val-data takes a name or a share, and it is empty")

    @property
    def own_samples(self) -> int:
        """How many samples of its own the model trains on (``data`` is self:NUM); 0: it trains on data."""
        found = _OWN.fullmatch(self.data)
        return int(found[1]) if found else 0

    @property
    def own_steps(self) -> tuple[int, ...]:
        """Steps per stage that these are drawn in; empty: the model's own."""
        found = _OWN.fullmatch(self.data)
        return tuple(map(int, found[2].split("+"))) if found and found[2] else ()


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The model to start from."""

    init_from: str | None = None
    """Start from the weights of a model (folder, bundled name or Hub id). Its tokenizer, sizes and stages are then the
    defaults; what does not fit is listed and initialised fresh."""
    lora_rank: int | None = None
    """Freeze the weights of --init-from and train low-rank matrices beside them (LoRA) of this rank."""

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.init_from is None:
            raise ValueError("--lora-rank needs --init-from: the model whose weights stay as they are")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"--lora-rank must be at least 1, got {self.lora_rank}")


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What the model to start from teaches."""

    distill: tuple[str, ...] | None = None
    """Learn the guided velocity of --init-from, the teacher, instead of the data's: one head pass then does what two
    did. Data and stages are the teacher's. Alone: guided by the teacher's settings. SCALE is for every stage, or give
    one per stage; SCALE@TIME guides from a time of the stage on, as in 1.3@0.5 2."""
    distill_steps: tuple[int, ...] = ()
    """Also take fewer steps: Euler steps per stage, each of which learns what the teacher does in a midpoint step (two
    velocities). The model is then for these steps only."""

    def __post_init__(self) -> None:
        if self.distill is None and self.distill_steps:
            raise ValueError("--distill-steps needs --distill")
        try:
            self.guidance  # noqa: B018
        except ValueError:
            raise ValueError(f"--distill takes SCALE or SCALE@TIME, as in 1.3@0.5 2; got {self.distill}") from None

    @property
    def guidance(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scales, and times from which they act, as given: one for every stage, or one per stage; empty: the
        teacher's own."""
        pairs = [one.partition("@") for one in self.distill or ()]
        return tuple(float(scale) for scale, _, _ in pairs), tuple(float(time or 0) for _, _, time in pairs)
