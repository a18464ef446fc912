"""Options of ``ecar train`` and ``ecar tokenizer``: frozen, validated when made; the text under a field is its help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ecar.config import MODEL_KINDS, JsonConfig, Side
from ecar.data.reading import ReadOptions

TOKENIZER_SIZES = {"channels": 4, "factor": 4, "widths": (32, 64, 128), "depth": 2, "patch": 1}
_DEFAULTS = {"model": "ecar", "preset": "ti", "resolution": (32,), "rho": 0.7, "context_noise": 0.3}

OWN = "self:"  # data that are samples of the model itself

# What --allow-change may name: all but the shapes of weights and optimizers. The last three are properties of the data.
CHANGEABLE = {
    "data", "split", "image_column", "label_column",
    "max_images", "flip", "batch_size", "warmup", "decay", "weight_decay", "ema", "label_dropout", "t_mean",
    "uniform_t", "seed", "stage_share", "stage_weight", "ends", "rho", "context_noise",
    "resolution", "tokenizer", "images", "class_names", "content",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ReadOptions, JsonConfig):
    """Options of ``ecar train``."""

    data: str
    """Folder of images (class subfolders give labels), WebDataset tars, parquet file or folder, Hub data set id, or a
    latent cache; self:NUM: as many samples that --init-from draws by its own settings (see ecar neon)."""
    out: str
    """Folder of the run. The same command again resumes."""
    allow_change: tuple[str, ...] = ()
    """Options, or properties of the data, that may differ from those of the run that is resumed."""
    tokenizer: str | None = None
    """pixels (default), pixels:FACTOR, a folder of `ecar tokenizer`, or a diffusers autoencoder (folder or Hub id).
    A latent cache brings its own."""
    init_from: str | None = None
    """Start from the weights of a model (folder, bundled name or Hub id). Its tokenizer, sizes and stages are then the
    defaults; what does not fit is listed and initialised fresh."""
    own_steps: tuple[int, ...] = ()
    """Steps per stage that self:NUM is drawn with, where the model's own settings are coarse."""
    lora_rank: int | None = None
    """With --init-from: freeze its weights and train low-rank matrices beside them (LoRA) of this rank."""
    lora_alpha: float | None = None
    """LoRA's product is scaled by alpha / rank; default: the rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get LoRA matrices, by the last part of their names; default to_qkv and to_out (attention)."""
    distill: bool = False
    """With --init-from: that model is the teacher, and its guided velocity the target instead of the data's. Afterwards
    one head pass does what two did. Same data and stages as the teacher's."""
    distill_guidance: tuple[float, ...] = ()
    """Guidance of the teacher: one scale for every stage, or one per stage; default: that of its own settings, with
    their guidance_from."""
    distill_guidance_from: tuple[float, ...] = ()
    """Time of each stage from which the teacher's guidance acts; default 0, with --distill-guidance."""
    distill_steps: tuple[int, ...] = ()
    """Also take fewer steps: Euler steps per stage, each of which learns what the teacher does in a midpoint step (two
    velocities). The model is then for these steps only."""
    model: str | None = None
    """ecar (default), or dit: the baseline (diffusers' DiT under single-scale flow matching, trunk + head blocks
    deep)."""
    preset: str | None = None
    """Model size: nano, ti (default), s, b, l or xl."""
    resolution: tuple[int, ...] = ()
    """Side of the images in pixels, or height and width; default 32."""
    stages: int | None = None
    """Number of stages, coarse to fine; default 2, and 1 for dit."""
    ends: tuple[float, ...] | None = None
    """b_k per stage; default 0.7 for every stage but the last, which ends at 1."""
    rho: float | None = None
    """Share of noise that a stage takes over from the one before; default 0.7."""
    width: int | None = None
    """Overrides the preset's width."""
    heads: int | None = None
    """Overrides the preset's attention heads."""
    trunk_depth: int | None = None
    """Overrides the preset's trunk blocks."""
    head_depth: int | None = None
    """Overrides the preset's head blocks."""
    patch: int | None = None
    """Side of the squares of latent positions that become one token; default 1. 2 for autoencoders of factor 8 at 256
    pixels (SD-VAE, TAESD, FLUX): 256 tokens, as in DiT."""
    context_noise: float | None = None
    """Noise on the maps that the trunk reads; default 0.3."""
    stage_share: tuple[float, ...] = ()
    """Share of each batch that trains each stage, non-increasing; default 1 each."""
    stage_weight: tuple[float, ...] = ()
    """Loss weight of each stage; default 1 each."""
    flip: bool = False
    """Mirror half of the images. Off by default: letters and shoes have a direction."""
    max_steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 128
    """Images per step, over all processes."""
    accumulate: int = 1
    """Cut each process's part of the batch into this many micro-batches, one after the other: same step, less memory.
    """
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass: same step, less memory, about a third more time."""
    parallel: str = "ddp"
    """Over several processes: ddp (each has the whole model) or fsdp (each has a slice; adamw only)."""
    optimizer: str = "adamw"
    """adamw, or muon (matrices of the blocks by Muon, the rest by AdamW)."""
    lr: float = 1e-3
    """Peak learning rate (Muon's updates are scaled to AdamW's): warm-up, flat, then linear to 2%."""
    warmup: int = 200
    """Warm-up steps."""
    decay: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls."""
    weight_decay: float = 0.01
    """Weight decay on matrices."""
    clip: float = 1.0
    """Gradient norm limit."""
    ema: tuple[float, ...] = (0.99,)
    """Decay of the weight average that is sampled and shipped; further ones are averages that are saved beside it, as
    final_ema_DECAY. The learning rate falls to zero, which averages too: keep 1 / (1 - decay) far below the steps."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for guidance."""
    t_mean: tuple[float, ...] = ()
    """Location of the logit-normal times per stage: above 0 trains more near the stage's end; default 0 each."""
    uniform_t: float = 0.2
    """Share of times drawn uniformly; the rest is logit-normal(t_mean, 1)."""
    dtype: str = "bf16"
    """Autocast: bf16 (fp32 all the same on devices that only imitate it) or fp32. Loss and head output are float32."""
    compile: bool = False
    """torch.compile the loss: a minute or two to start, then faster."""
    device: str = "auto"
    """Device to train on: auto (cuda where there is one), cpu, cuda, mps."""
    seed: int = 0
    """Seed of weights, data order, noise and times."""
    max_images: int | None = None
    """Use this many images only, chosen at random."""
    log_every: int = 50
    """Steps between log lines."""
    sample_every: int = 1000
    """Steps between sample grids (fixed seeds, averaged weights); 0 is off."""
    save_every: int = 1000
    """Steps between checkpoints."""
    async_save: bool = False
    """Write checkpoints in the background: a step waits for a copy only."""
    stall_timeout: float = 600.0
    """Seconds without progress of one of several processes after which all end and say which; longer than a save or a
    sample grid takes."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers beside log.jsonl: tensorboard, wandb, trackio; no name after it: none."""

    def __post_init__(self) -> None:
        if self.init_from is None:  # else the model's own are the defaults: ``finetune.with_defaults``
            stages = 1 if self.model == "dit" else 2
            _fill_in(self, {**_DEFAULTS, "stages": stages})
        object.__setattr__(self, "allow_change", tuple(key.replace("-", "_") for key in self.allow_change))
        if unknown := set(self.allow_change) - CHANGEABLE:
            raise ValueError(
                f"allow_change: {', '.join(sorted(unknown))} cannot change within a run (start another one with "
                f"--init-from); what can: {', '.join(sorted(CHANGEABLE))}"
            )
        for name in ("max_steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.resolution and (len(self.resolution) > 2 or min(self.resolution) < 1):
            raise ValueError(f"resolution takes one side, or height and width; got {self.resolution}")
        if self.stages is not None and self.model is not None:
            self._check_stages(self.stages)
        if unknown := set(self.trackers) - {"tensorboard", "wandb", "trackio"}:
            raise ValueError(f"trackers must be of tensorboard, wandb, trackio; got {', '.join(sorted(unknown))}")
        if self.dtype not in ("bf16", "fp32"):
            raise ValueError(f"dtype must be bf16 or fp32, got {self.dtype!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, got {self.parallel!r}")
        if self.parallel == "fsdp" and self.optimizer == "muon":
            raise ValueError("muon needs whole matrices, which --parallel fsdp cuts; use --optimizer adamw, or ddp")
        if self.parallel == "fsdp" and self.lora_rank is not None:
            raise ValueError("lora_rank trains few weights, and --parallel fsdp would cut the frozen ones; use ddp")
        if self.stall_timeout <= 0:
            raise ValueError(f"stall_timeout must be positive, got {self.stall_timeout}")
        if isinstance(self.ema, float | int):  # one number stands for itself
            object.__setattr__(self, "ema", (float(self.ema),))
        if not self.ema or len(set(self.ema)) < len(self.ema) or any(not 0 <= d < 1 for d in self.ema):
            raise ValueError(f"ema takes different decays in [0, 1), got {self.ema}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout}")
        self._check_finetuning()
        if not 0 <= self.uniform_t <= 1 or not 0 <= self.decay <= 1:
            raise ValueError(f"uniform_t and decay must be in [0, 1], got {self.uniform_t} and {self.decay}")
        if not (0 < self.lr < math.inf and self.clip > 0):
            raise ValueError(f"lr and clip must be positive, got {self.lr} and {self.clip}")
        if not 0 <= self.weight_decay < math.inf or min(self.warmup, self.sample_every) < 0:
            raise ValueError("weight_decay, warmup and sample_every must not be negative")
        if not 0 <= self.seed < 2**53:
            raise ValueError(f"seed must be in 0..2^53-1, got {self.seed}")

    def _check_finetuning(self) -> None:
        """Check the options of LoRA and distillation."""
        if (self.lora_alpha is not None or self.lora_targets) and self.lora_rank is None:
            raise ValueError("lora_alpha and lora_targets need lora_rank")
        if self.lora_rank is not None:
            if self.init_from is None:
                raise ValueError("lora_rank needs init_from: the model whose weights stay as they are")
            if self.lora_rank < 1 or not (self.lora_alpha is None or self.lora_alpha > 0):
                raise ValueError(f"lora_rank and lora_alpha must be positive: {self.lora_rank}, {self.lora_alpha}")
        if self.data.startswith(OWN) and not self.own_samples:
            raise ValueError(f"data {self.data}: {OWN} takes a number of samples, at least 1, as in {OWN}6144")
        if self.own_samples and (self.init_from is None or self.tokenizer or self.flip or self.max_images):
            raise ValueError(f"data {self.data} needs init_from, and goes without tokenizer, flip and max_images")
        if self.own_steps and not self.own_samples:
            raise ValueError(f"own_steps is for data {OWN}NUM")
        if self.distill and self.init_from is None:
            raise ValueError("distill needs init_from, the teacher")
        if not self.distill and any((self.distill_guidance, self.distill_guidance_from, self.distill_steps)):
            raise ValueError("distill_guidance, distill_guidance_from and distill_steps need --distill")
        if self.distill_steps and any(self.t_mean):
            raise ValueError("distill_steps trains at the times where its steps start: leave out t_mean")

    def _check_stages(self, stages: int) -> None:
        """Check the options that have one entry per stage, and fill in their defaults."""
        if self.model not in MODEL_KINDS:
            raise ValueError(f"model must be one of {', '.join(MODEL_KINDS)}, got {self.model!r}")
        if self.model == "dit" and (stages != 1 or self.trunk_depth):
            raise ValueError("dit has one stage and no trunk; leave out those options")
        if stages < 1:
            raise ValueError(f"stages must be at least 1, got {stages}")
        share = shares(self.stage_share, stages)
        weight = self.stage_weight or (1.0,) * stages
        t_mean = self.t_mean or (0.0,) * stages
        if any(len(entries) != stages for entries in (weight, t_mean)):
            raise ValueError(f"stage_weight and t_mean need one entry per stage ({stages})")
        if not all(0 <= w < math.inf for w in weight) or sum(weight) == 0 or not all(map(math.isfinite, t_mean)):
            raise ValueError(f"stage_weight must not be negative, nor all zero, and t_mean finite: {weight}, {t_mean}")
        object.__setattr__(self, "stage_share", share)
        object.__setattr__(self, "stage_weight", weight)
        object.__setattr__(self, "t_mean", t_mean)

    @property
    def own_samples(self) -> int:
        """How many samples of its own the model trains on (``data`` is self:NUM); 0: it trains on data."""
        number = self.data.removeprefix(OWN)
        return int(number) if number != self.data and number.isdecimal() else 0

    @property
    def num_stages(self) -> int:
        """``stages`` with its default filled in."""
        assert self.stages is not None
        return self.stages

    @property
    def image_side(self) -> Side:
        """(height, width) in pixels."""
        return self.resolution[0], self.resolution[-1]


def shares(given: tuple[float, ...], stages: int) -> tuple[float, ...]:
    """The share of a batch that trains each stage, from the option ``stage_share``.

    Raises:
        ValueError: not one for each of ``stages``, or a stage that gets more images than the one before it.
    """
    share = given or (1.0,) * stages
    if len(share) != stages:
        raise ValueError(f"stage_share needs one entry per stage ({stages}), got {share}")
    if share[0] != 1.0 or list(share) != sorted(share, reverse=True) or share[-1] <= 0:
        raise ValueError(f"stage_share must start at 1 and not increase (a stage needs the ones before), got {share}")
    return share


def _fill_in(config: TrainConfig | TokenizerConfig, defaults: dict[str, Any]) -> None:
    """``defaults`` in the place of what was left open."""
    for name, value in defaults.items():
        if getattr(config, name) in (None, ()):
            object.__setattr__(config, name, value)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(ReadOptions):
    """Options of ``ecar tokenizer``."""

    data: tuple[str, ...]
    """Folder of images, WebDataset tars, parquet file or folder, or Hub data set id; several are read as one."""
    out: str
    """Folder to write: the tokenizer, log.jsonl, reconstructions.png. The same command again resumes."""
    init_from: str | None = None
    """Start from this tokenizer (a folder that this command wrote, or MODEL/tokenizer), with its sizes."""
    freeze_encoder: bool = False
    """Train the decoder only, with --init-from: latents stay what they are, and models of them take the new decoder
    (--decoder)."""
    resolution: int = 32
    """Side of the training images in pixels."""
    crop: int | None = None
    """Train on random squares of this side: a convolutional autoencoder learns on 128 pixels and decodes any size.
    Default: whole images."""
    channels: int | None = None
    """Latent channels; default 4."""
    factor: int | None = None
    """Pixels per latent position, along each side; a power of two; default 4."""
    widths: tuple[int, ...] = ()
    """Channels per level from the image side inwards, log2(factor / patch) + 1 of them; default 32 64 128."""
    patch: int | None = None
    """Side of the squares of pixels that the first and last convolution take at once; default 1. 4 for photographs of
    256 pixels: full size is where most time goes."""
    depth: int | None = None
    """Residual blocks per decoder level; default 2."""
    max_steps: int = 4000
    """Optimizer steps."""
    batch_size: int = 128
    """Images per step."""
    optimizer: str = "adamw"
    """adamw, or muon (hidden convolutions by Muon, the rest by AdamW)."""
    lr: float = 2e-3
    """Peak learning rate (Muon's updates are scaled to AdamW's); 5% warm-up, cosine decay to 1%."""
    compile: bool = False
    """torch.compile encoder and decoder: a minute or two to start, then faster."""
    perceptual: float = 0.5
    """Weight of the perceptual term; 0 is off (and needs no EfficientNet weights)."""
    adversarial: float = 0.0
    """Weight of the adversarial term, for sharp images; 0 is off. For an autoencoder that is good already: with
    --init-from, a tenth of the learning rate, and 0.2."""
    scale_consistency: float = 0.5
    """Weight of the pooled terms; 0 is off."""
    scale_levels: int = 1
    """How many poolings to ask consistency for: stages - 1."""
    latent_noise: float = 0.1
    """Standard deviation of the noise on unit-scale latents."""
    max_images: int | None = None
    """Use this many images only, chosen at random."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between log lines."""
    seed: int = 0
    """Seed of weights, order and noise."""
    device: str = "auto"
    """Device to train on: auto (cuda where there is one), cpu, cuda, mps."""

    def __post_init__(self) -> None:
        for name in ("resolution", "max_steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.init_from is None:  # else they are those of the tokenizer there
            _fill_in(self, TOKENIZER_SIZES)
            self._check_sizes()
        weights = self.scale_levels, self.scale_consistency, self.perceptual, self.latent_noise, self.adversarial
        if not (all(0 <= w < math.inf for w in weights) and 0 < self.lr < math.inf):
            raise ValueError(
                "scale_levels, scale_consistency, perceptual, latent_noise and adversarial must not be negative, "
                "and lr must be positive"
            )
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"crop must be at least 1, got {self.crop}")
        if isinstance(self.data, str):  # one name stands for itself
            object.__setattr__(self, "data", (self.data,))
        if self.freeze_encoder and self.init_from is None:
            raise ValueError("freeze_encoder needs init_from, the tokenizer whose latents stay")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed must be in 0..2^40-1, got {self.seed}")
        if self.init_from is None:
            self.check_resolution()

    def _check_sizes(self) -> None:
        """ValueError unless channels, factor, widths and depth, all filled in, make a network."""
        assert self.channels is not None and self.factor is not None and self.depth is not None
        for name in ("channels", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        assert self.patch is not None
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ValueError(f"factor must be a power of two of at least 2, got {self.factor}")
        if self.patch < 1 or self.patch & (self.patch - 1) or self.patch >= self.factor:
            raise ValueError(f"patch must be a power of two below factor {self.factor}, got {self.patch}")
        levels = (self.factor // self.patch).bit_length()
        if len(self.widths) != levels or min(self.widths) < 1:
            raise ValueError(
                f"widths needs {levels} positive entries for factor {self.factor} and patch {self.patch}, "
                f"got {self.widths}"
            )

    def check_resolution(self) -> None:
        """ValueError unless the latents of the images pool as often as asked for. With ``init_from`` the trainer calls
        it, when ``factor`` is that of the tokenizer there."""
        assert self.factor is not None
        smallest = self.factor * 2 ** (self.scale_levels if self.scale_consistency else 0)
        if self.side % smallest:
            name = "resolution" if self.crop is None else "crop"
            raise ValueError(f"{name} {self.side} does not divide by {smallest} (factor and pooling levels)")
        if self.side > self.resolution:
            raise ValueError(f"crop {self.side} is larger than resolution {self.resolution}")

    @property
    def side(self) -> int:
        """Side in pixels of what a step trains on."""
        return self.resolution if self.crop is None else self.crop
