"""Options of what a run starts from: data, a model, a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from ecar.data.reading import DATA, ReadOptions
from ecar.files.options import option

OWN = "self:"  # data that are samples of the model itself


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadOptions):
    """The data and how they are read."""

    data: str = option(resume="allowed", moves=DATA)
    """Folder of images (class subfolders give labels), WebDataset tars, parquet file or folder, Hub data set id, or a
    latent cache; self:NUM: as many samples that --init-from draws by its own settings (see ecar neon)."""
    tokenizer: str | None = option(None, resume="allowed", moves=("tokenizer", "velocity_std"))
    """pixels (default), pixels:FACTOR, a folder of `ecar tokenizer`, or a diffusers autoencoder (folder or Hub id).
    A latent cache brings its own."""
    max_images: int | None = option(None, resume="allowed", moves=DATA)
    """Use this many images only, chosen at random."""
    flip: bool = option(False, resume="allowed", moves=DATA)
    """Mirror half of the images. Off by default: letters and shoes have a direction."""
    label_dropout: float = option(0.1, resume="allowed")
    """Share of labels replaced by the null class, for guidance."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"--label-dropout must be in [0, 1), got {self.label_dropout}")
        if self.data.startswith(OWN) and not self.own_samples:
            raise ValueError(f"--data {self.data}: {OWN} takes a number of samples, at least 1, as in {OWN}6144")
        if self.own_samples and (self.tokenizer or self.flip or self.max_images):
            raise ValueError(f"--data {self.data} goes without --tokenizer, --flip and --max-images")

    @property
    def own_samples(self) -> int:
        """How many samples of its own the model trains on (``data`` is self:NUM); 0: it trains on data."""
        number = self.data.removeprefix(OWN)
        return int(number) if number != self.data and number.isdecimal() else 0


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The model to start from."""

    init_from: str | None = None
    """Start from the weights of a model (folder, bundled name or Hub id). Its tokenizer, sizes and stages are then the
    defaults; what does not fit is listed and initialised fresh."""
    own_steps: tuple[int, ...] = ()
    """Steps per stage that --data self:NUM is drawn with, where the model's own settings are coarse."""
    lora_rank: int | None = None
    """Freeze the weights of --init-from and train low-rank matrices beside them (LoRA) of this rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get LoRA matrices, by the last part of their names; default to_qkv and to_out (attention)."""

    def __post_init__(self) -> None:
        if self.lora_targets and self.lora_rank is None:
            raise ValueError("--lora-targets needs --lora-rank")
        if self.lora_rank is not None and self.init_from is None:
            raise ValueError("--lora-rank needs --init-from: the model whose weights stay as they are")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"--lora-rank must be at least 1, got {self.lora_rank}")


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What the model to start from teaches."""

    distill: bool = False
    """The model of --init-from is the teacher, and its guided velocity the target instead of the data's. Afterwards one
    head pass does what two did. Same data and stages as the teacher's."""
    distill_guidance: tuple[float, ...] = ()
    """Guidance of the teacher: one scale for every stage, or one per stage; default: that of its own settings, with
    their guidance_from."""
    distill_guidance_from: tuple[float, ...] = ()
    """Time of each stage from which the teacher's guidance acts; default 0, with --distill-guidance."""
    distill_steps: tuple[int, ...] = ()
    """Also take fewer steps: Euler steps per stage, each of which learns what the teacher does in a midpoint step (two
    velocities). The model is then for these steps only."""

    def __post_init__(self) -> None:
        if not self.distill and any((self.distill_guidance, self.distill_guidance_from, self.distill_steps)):
            raise ValueError("--distill-guidance, --distill-guidance-from and --distill-steps need --distill")
