"""Train the convolutional autoencoder (``ecar tokenizer``).

Loss, on images x with latents z (unit scale by running statistics):

    reconstruction      |dec(z + noise) - x|          L1 + squared error
    perceptual          EfficientNet-Lite0 features of the first strides, channel-normalised as in LPIPS (1801.03924)
    scale consistency   the same two between dec(D z + noise) and D x, for 2x2 pooling D and its powers
                        (EQ-VAE 2502.09509, 2502.14831): every coarse stage of ECAR lives on pooled latents
    adversarial         off unless asked for: what a network that tells dec(z + noise) from x makes of it (VQGAN)

The noise keeps neighbouring latents decodable, so that small errors of the sampler stay small in the image. With a
frozen encoder only the decoder is trained, and models of its latents stay good.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ecar.config import differences
from ecar.data.source import ImageReport, iterate_images, load_source
from ecar.devices import images_at_once, mixed_precision, resolve_device
from ecar.evaluation.features import EfficientNetLite
from ecar.files.images import to_signed
from ecar.files.lock import run_lock
from ecar.tokenizers import load_tokenizer
from ecar.tokenizers.conv import ConvTokenizer
from ecar.training.adversary import Adversary
from ecar.training.config import TOKENIZER_SIZES, TokenizerConfig
from ecar.training.engine.about import run_record
from ecar.training.engine.checkpoint import load_checkpoint, restore_training, save_checkpoint, training_tensors
from ecar.training.engine.ema import EMA
from ecar.training.engine.log import RunLog
from ecar.training.engine.optim import BatchedMuon
from ecar.training.engine.pace import Pace
from ecar.training.engine.signals import Stopped, StopRequest
from ecar.training.run import check_max_steps, check_same_options, make_out

Network = TypeVar("Network", bound=nn.Module)
_PERCEPTUAL_BLOCKS = (0, 2, 4)  # EfficientNet-Lite0 blocks at strides 2, 4 and 8
_STATISTICS_MOMENTUM = 0.02
_EMA = 0.995
_IN_MEMORY = 2**30  # bytes of images
_HIDDEN = 64  # channels on both sides of a convolution that Muon trains


class TokenizerLoss:
    """The loss above as a function of (images, noise); keeps the running statistics in ``tokenizer.mean, .std``."""

    def __init__(self, tokenizer: ConvTokenizer, config: TokenizerConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.features = _channels_last(EfficientNetLite(), config.device) if config.perceptual else None
        self.adversary = Adversary(config.adversarial, config.device, config.seed) if config.adversarial else None
        self.decoded: Tensor | None = None
        self.encode, self.decode = tokenizer.encode_raw, tokenizer.decode_raw
        if config.compile:
            self.encode = torch.compile(self.encode, dynamic=False)
            self.decode = torch.compile(self.decode, dynamic=False)

    def __call__(self, images: Tensor, noise: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Images (B, 3, H, W) in [-1, 1], one noise map per level -> named terms (unweighted), raw latents."""
        tok, cfg = self.tokenizer, self.config
        raw = self.encode(images)
        latents = tok.normalize(raw)
        terms: dict[str, Tensor] = {}
        levels = range(1 + (cfg.scale_levels if cfg.scale_consistency else 0))
        for level in levels:
            if level:
                latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
            decoded = self.decode(tok.denormalize(latents + cfg.latent_noise * noise[level])).float()
            if self.adversary is not None and not level:
                self.adversary.oppose(decoded)
                self.decoded = decoded
            error = decoded - images
            terms[f"reconstruction_{level}"] = error.abs().mean() + error.square().mean()
            if self.features is not None:
                terms[f"perceptual_{level}"] = self.perceptual(decoded, images)
        return terms, raw

    def perceptual(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Mean squared distance of channel-normalised features."""
        assert self.features is not None
        maps = []
        for picture in (decoded, images.detach()):
            layers = self.features.layers(picture, _PERCEPTUAL_BLOCKS[-1])
            maps.append([F.normalize(layers[1 + b].float(), dim=1) for b in _PERCEPTUAL_BLOCKS])
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(*maps, strict=True)]).mean()

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        cfg = self.config
        weights = {name: 1.0 if name.endswith("_0") else cfg.scale_consistency for name in terms}
        factors = {name: cfg.perceptual if name.startswith("perceptual") else 1.0 for name in terms}
        return torch.stack([weights[n] * factors[n] * t for n, t in terms.items()]).sum()


def train_tokenizer(config: TokenizerConfig) -> ConvTokenizer:
    """Train, write ``config.out`` and return the averaged tokenizer.

    Raises:
        ValueError: bad data, or an ``out`` folder of another configuration or of a run that is active.
        Stopped: a signal came; the checkpoint is written.
    """
    config = replace(config, device=resolve_device(config.device))
    if not config.data:
        raise ValueError("--data takes at least one name")
    for data in config.data:
        out = make_out(config.out, data)
    with run_lock(out), StopRequest() as stop:
        return _train(replace(config, out=str(out)), out, stop)


def _train(config: TokenizerConfig, out: Path, stop: StopRequest) -> ConvTokenizer:
    given = _given(config)
    if given is not None:
        config = replace(config, **{name: getattr(given, name) for name in TOKENIZER_SIZES})
        config.check_resolution()
    free = ("out", "device", "save_every", "log_every")
    options = {**asdict(config), "init_from": given.fingerprint() if given else None}
    check_same_options(out / "train.json", {k: v for k, v in options.items() if k not in free})
    images, content, about = _read_images(config, out)
    grey = all(bool((part == part[..., :1]).all()) for part in _parts(images))
    if given is not None and given.image_channels == 1 and not grey:
        raise ValueError(
            f"--init-from {config.init_from} is for grey images, and those of {' '.join(config.data)} are coloured"
        )
    torch.manual_seed(config.seed)
    assert config.channels is not None and config.factor is not None and config.depth is not None
    tokenizer = given or ConvTokenizer(
        channels=config.channels,
        factor=config.factor,
        image_channels=1 if grey else 3,
        widths=config.widths,
        depth=config.depth,
        patch=config.patch or 1,
    )
    tokenizer.encoder.requires_grad_(not config.freeze_encoder)
    _channels_last(tokenizer, config.device)
    run = _Run(config, tokenizer, images, content, out)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    record = run_record(config, images=len(images), parameters=parameters, data=about)
    with RunLog(out, step=run.step, trackers=("tensorboard",), record=record) as log:
        log.begin(run.step * config.batch_size)
        stop.begun = True
        run.run(log, stop)
    run.ema.copy_to(tokenizer)
    tokenizer.save(out)  # with running statistics: measuring takes minutes, and may be stopped
    if not config.freeze_encoder:
        _measure(tokenizer, images, config)
        tokenizer.save(out)
    _save_reconstructions(tokenizer, images[:16], out / "reconstructions.png", config.device)
    return tokenizer


def _given(config: TokenizerConfig) -> ConvTokenizer | None:
    """The tokenizer that the run starts from.

    Raises:
        ValueError: not one of this kind, or of another shape than options ask for.
    """
    if config.init_from is None:
        return None
    tokenizer = load_tokenizer(config.init_from)
    if not isinstance(tokenizer, ConvTokenizer):
        raise ValueError(
            f"--init-from {config.init_from} is a {tokenizer.kind} tokenizer; only own ones can be trained"
        )
    for key in TOKENIZER_SIZES:
        asked, own = getattr(config, key), getattr(tokenizer, key)
        if asked not in (None, (), own):
            raise ValueError(f"--init-from {config.init_from} has {key} {own}, not {asked}: leave the option out")
    return tokenizer


def _optimizers(tokenizer: ConvTokenizer, config: TokenizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden convolutions: those between wide maps. In a first comparison of
    four minutes, Muon was 0.5 dB ahead after a quarter of the crops."""
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    hidden = [p for p in trained if config.optimizer == "muon" and p.ndim == 4 and min(p.shape[:2]) >= _HIDDEN]
    ours = {id(p) for p in hidden}
    rest = [p for p in trained if id(p) not in ours]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    ]
    if hidden:
        optimizers.append(BatchedMuon(hidden, lr=config.lr, weight_decay=0.01))
    return optimizers


class _Run:
    """State of a run: tokenizer, average, optimizer, step."""

    def __init__(
        self, config: TokenizerConfig, tokenizer: ConvTokenizer, images: np.ndarray, content: str, out: Path
    ) -> None:
        self.config, self.tokenizer, self.images, self.out = config, tokenizer, images, out
        self.data = {"images": len(images), "content": content}
        self.loss, self.ema = TokenizerLoss(tokenizer, config), EMA(tokenizer, _EMA)
        self.optimizers = _optimizers(tokenizer, config)
        self.own = tuple(self.optimizers)  # of the tokenizer itself
        self.optimizers += [self.loss.adversary.optimizer] if self.loss.adversary else []
        self.step = 0
        found = load_checkpoint(out)
        if found is not None:
            if changed := differences(found[1], self.data):
                raise ValueError(
                    f"the data changed since the checkpoint in {out} ({changed}); restore them, or choose another --out"
                )
            restore_training(found[0], tokenizer, self.ema, self.optimizers)
            self.step = self.ema.updates = int(found[1]["step"])
            check_max_steps(config.max_steps, self.step, out)
            if self.loss.adversary is not None:
                self.loss.adversary.restore(found[0], self.step)

    def run(self, log: RunLog, stop: StopRequest) -> None:
        """From the step that the checkpoint left to ``max_steps``."""
        config, sums, steps = self.config, dict[str, Tensor](), 0
        start, pace = time.perf_counter(), Pace(config.device, log)
        for now in tqdm(
            range(self.step + 1, config.max_steps + 1), initial=self.step, total=config.max_steps, disable=None
        ):
            with pace.step(now):
                terms = self._train_step(now)
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros(())) + term.detach().cpu()
            steps += 1
            if now % config.log_every == 0 or now == config.max_steps:
                means = {name: float(value) / steps for name, value in sums.items()}
                seconds = log.seconds_before + time.perf_counter() - start
                log.write(step=now, images=now * config.batch_size, seconds=round(seconds, 2), **means)
                sums, steps = {}, 0
            code = stop.code
            if now % config.save_every == 0 or now == config.max_steps or code:
                save_checkpoint(self.out, now, self._tensors(), self.data)
            if code and now < config.max_steps:
                raise Stopped(now, code)

    def _tensors(self) -> dict[str, Tensor]:
        adversary = self.loss.adversary.tensors() if self.loss.adversary else {}
        return {**training_tensors(self.tokenizer, self.ema, self.optimizers), **adversary}

    def _train_step(self, now: int) -> dict[str, Tensor]:
        """One update; the terms of the loss."""
        config, tokenizer = self.config, self.tokenizer
        lr = config.lr * _cosine(now, config.max_steps)
        for optimizer in self.own:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        batch, noise = _draw(config, self.images, now)
        with mixed_precision(config.device):
            terms, raw = self.loss(batch, noise)
        self.loss.total(terms).backward()
        norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"step {now}: the gradient is not finite; lower --lr (now {config.lr})")
        for optimizer in self.own:
            optimizer.step()
        self.ema.update(tokenizer)
        if not config.freeze_encoder:
            _update_statistics(tokenizer, raw.detach().float(), 1.0 if now == 1 else _STATISTICS_MOMENTUM)
        if self.loss.adversary is not None:
            assert self.loss.decoded is not None
            terms["adversary"] = self.loss.adversary.learn(batch, self.loss.decoded)
        return terms


def _draw(config: TokenizerConfig, images: np.ndarray, step: int) -> tuple[Tensor, list[Tensor]]:
    """Batch and noise of a step: a function of (seed, step), so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = torch.randint(len(images), (config.batch_size,), generator=generator).numpy()
    room = config.resolution - config.side + 1
    corners = torch.randint(room, (config.batch_size, 2), generator=generator).tolist() if room > 1 else ()
    crops = [images[row, y : y + config.side, x : x + config.side] for row, (y, x) in zip(rows, corners, strict=False)]
    batch = torch.from_numpy(to_signed(np.stack(crops) if crops else images[rows])).permute(0, 3, 1, 2)
    batch = batch.to(config.device, memory_format=torch.channels_last)
    assert config.channels is not None and config.factor is not None
    side, noise = config.side // config.factor, []
    for level in range(1 + config.scale_levels):
        shape = (config.batch_size, config.channels, side >> level, side >> level)
        noise.append(torch.randn(shape, generator=generator).to(config.device))
    return batch, noise


def _channels_last(module: Network, device: str) -> Network:
    """Move ``module`` in place; convolutions on CPU run faster with channels last."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def _cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return step / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _update_statistics(tokenizer: ConvTokenizer, raw: Tensor, momentum: float) -> None:
    tokenizer.mean.lerp_(raw.mean((0, 2, 3)), momentum)
    tokenizer.std.lerp_(raw.std((0, 2, 3)).clamp_min(1e-4), momentum)


@torch.no_grad()
def _measure(tokenizer: ConvTokenizer, images: np.ndarray, config: TokenizerConfig) -> None:
    """Statistics of the averaged encoder over some 2,000 images: their 500,000 positions are enough."""
    spread = images[:: max(1, len(images) // 2_000)]  # folders are sorted by class
    batches = (torch.from_numpy(to_signed(part)).permute(0, 3, 1, 2) for part in _parts(spread))
    tokenizer.measure(tokenizer.encode_raw(batch.to(config.device)).float() for batch in batches)


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images (N, H, W, 3), a few at a time."""
    count = images_at_once(*images.shape[1:3], most=500)
    return (images[first : first + count] for first in range(0, len(images), count))


def _read_images(config: TokenizerConfig, out: Path) -> tuple[np.ndarray, str, dict[str, Any]]:
    """The images (N, H, W, 3) uint8, a fingerprint of what was read, and what was found, by data set."""
    contents: list[str] = []
    about: dict[str, Any] = {}
    side, done = config.resolution, 0
    sources = [load_source(data, config.reading(), max_images=config.max_images) for data in config.data]
    images = _room((sum(map(len, sources)), side, side, 3), out)
    for data, source in zip(config.data, sources, strict=True):
        report = ImageReport()
        for part, _ in iterate_images(source, side, side, batch_size=100, report=report):
            images[done : done + len(part)] = part
            done += len(part)
        report.name_skipped()
        contents.append(report.content)
        about[data] = source.about()
    return images[:done], " ".join(contents), about


def _room(shape: tuple[int, ...], out: Path) -> np.ndarray:
    """Room for images in memory; beyond ``_IN_MEMORY`` bytes in a file in ``out`` that is mapped into it. The file has
    no name, and goes with the process.

    Raises:
        OSError: the disk has no room for it. Found out later, a full disk would kill the process.
    """
    size = math.prod(shape)
    if size <= _IN_MEMORY:
        return np.empty(shape, np.uint8)
    with TemporaryFile(dir=out) as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise OSError(f"{out}: no room for {size / 1e9:.1f} GB of images ({error.strerror})") from None
        return np.memmap(file, np.uint8, "r+", shape=shape)


def _save_reconstructions(tokenizer: ConvTokenizer, images: np.ndarray, path: Path, device: str) -> None:
    """Rows: images; decoded latents; decoded pooled latents (enlarged)."""
    from PIL import Image

    batch = torch.from_numpy(to_signed(images)).permute(0, 3, 1, 2).to(device)
    latents = tokenizer.encode(batch)
    pictures = [batch, tokenizer.decode(latents)]
    if min(latents.shape[-2:]) > 1:
        coarse = tokenizer.decode(F.avg_pool2d(latents, 2))
        pictures.append(F.interpolate(coarse, size=batch.shape[-2:], mode="nearest"))
    rows = [torch.cat(list(r), dim=2) for r in pictures]
    grid = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(path)
