"""The task of ``ecar tokenizer``: train the convolutional autoencoder.

With a frozen encoder only the decoder is trained, and models of its latents stay good.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.config import differences
from ecar.data.source import ImageReport, iterate_images, load_source
from ecar.devices import images_at_once, mixed_precision, resolve_device
from ecar.files.images import to_signed
from ecar.files.lock import run_lock
from ecar.files.options import changed, flat
from ecar.files.records import make_out
from ecar.processes.signals import StopRequest
from ecar.processes.world import Part
from ecar.sampling.pictures import grid, to_pil
from ecar.tokenizers import load_tokenizer
from ecar.tokenizers.conv import ConvTokenizer
from ecar.training.engine.optim import WEIGHT_DECAY, BatchedMuon
from ecar.training.engine.resume import check_options, keep_options
from ecar.training.engine.task import Losses, Task
from ecar.training.engine.trainer import Trainer
from ecar.training.tokenizer_config import Sizes, TokenizerConfig
from ecar.training.tokenizer_loss import TokenizerLoss, channels_last

_STATISTICS_MOMENTUM = 0.02
_EMA = 0.995
_IN_MEMORY = 2**30  # bytes of images
_HIDDEN = 64  # channels on both sides of a convolution that Muon trains


def train_tokenizer(config: TokenizerConfig) -> ConvTokenizer:
    """Train, write ``config.run.out`` and return the averaged tokenizer.

    Raises:
        ValueError: bad data, or an ``out`` folder of another configuration or of a run that is active.
        NonFiniteLossError: steps in a row without a finite loss.
        Stopped: a signal came; the checkpoint is written.
    """
    for data in config.data.data:
        out = make_out(config.run.out, data)
    with run_lock(out), StopRequest() as stop:
        return _train(config, out, stop)


def _train(asked: TokenizerConfig, out: Path, stop: StopRequest) -> ConvTokenizer:
    given = _given(asked)
    sizes = asked.network.resolve(None if given is None else _sizes(given))
    asked.check_side(sizes.factor)
    asked = changed(asked, **asdict(sizes))
    check_options(out, TokenizerConfig, asked)
    images, content, about = _read_images(asked, out)
    grey = all(bool((part == part[..., :1]).all()) for part in _parts(images))
    if given is not None and given.image_channels == 1 and not grey:
        raise ValueError(
            f"--init-from {asked.network.init_from} is for grey images, and those of {' '.join(asked.data.data)} are "
            "coloured"
        )
    config = changed(asked, device=resolve_device(asked.run.device))
    data = {"images": len(images), "content": content, "init_from": given.fingerprint() if given else None}
    torch.manual_seed(config.run.seed)
    tokenizer = given or ConvTokenizer(image_channels=1 if grey else 3, **asdict(sizes))
    tokenizer.encoder.requires_grad_(not config.network.freeze_encoder)
    channels_last(tokenizer, config.run.device)
    task = Autoencoder(config, tokenizer, images, data, about)
    trainer = Trainer(task, config.run, out, ema=(_EMA,), stop=stop)
    keep_options(out, asked)
    trainer.run()
    trainer.ema.copy_to(tokenizer)
    tokenizer.save(out)  # with running statistics: measuring takes minutes, and may be stopped
    if not config.network.freeze_encoder:
        _measure(tokenizer, images, config)
        tokenizer.save(out)
    _save_reconstructions(tokenizer, images[:16], out / "reconstructions.png", config.run.device)
    return tokenizer


def _given(config: TokenizerConfig) -> ConvTokenizer | None:
    """The tokenizer that the run starts from; ValueError where it is not one of this kind."""
    name = config.network.init_from
    if name is None:
        return None
    tokenizer = load_tokenizer(name)
    if not isinstance(tokenizer, ConvTokenizer):
        raise ValueError(f"--init-from {name} is a {tokenizer.kind} tokenizer; only own ones can be trained")
    return tokenizer


def _sizes(tokenizer: ConvTokenizer) -> Sizes:
    return Sizes(**{f.name: getattr(tokenizer, f.name) for f in fields(Sizes)})


def _optimizers(tokenizer: ConvTokenizer, config: TokenizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden convolutions: those between wide maps. In a first comparison of
    four minutes, Muon was 0.5 dB ahead after a quarter of the crops."""
    trained, muon = [p for p in tokenizer.parameters() if p.requires_grad], config.optimizer.optimizer == "muon"
    hidden = [p for p in trained if muon and p.ndim == 4 and min(p.shape[:2]) >= _HIDDEN]
    ours = {id(p) for p in hidden}
    rest = [p for p in trained if id(p) not in ours]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.optimizer.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    ]
    if hidden:
        optimizers.append(BatchedMuon(hidden, lr=config.optimizer.lr, weight_decay=WEIGHT_DECAY))
    return optimizers


class Autoencoder(Task):
    """The task of ``ecar tokenizer``, for a ``Trainer``.

    Args:
        config: options; ``device`` as resolved.
        tokenizer: on its device.
        images: (N, H, W, 3), uint8.
        data: number and fingerprint of the images, and of the tokenizer that was started from.
        found: what was found in the data, for the log.
    """

    module: ConvTokenizer

    def __init__(
        self,
        config: TokenizerConfig,
        tokenizer: ConvTokenizer,
        images: np.ndarray,
        data: dict[str, Any],
        found: dict[str, Any],
    ) -> None:
        self.config, self.module, self.images = config, tokenizer, images
        self.data, self.found, self.rows = data, found, (config.run.batch_size,)
        self.loss = TokenizerLoss(tokenizer, config)
        levels = range(1 + (config.loss.scale_levels if config.loss.scale_consistency else 0))
        kinds = ("reconstruction", "perceptual") if config.loss.perceptual else ("reconstruction",)
        self.terms = tuple(f"{kind}_{level}" for level in levels for kind in kinds)
        self.names = self.terms + (("adversary",) if self.loss.adversary else ())

    def wrapped(self) -> tuple[nn.Module, list[nn.Module], bool]:
        return self.loss, [], False

    def optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
        """The adversary's takes its own steps."""
        adversary = self.loss.adversary
        return _optimizers(self.module, self.config), [adversary.optimizer] if adversary else []

    def rate(self, step: int) -> float:
        return self.config.optimizer.lr * _cosine(step, self.config.run.max_steps)

    def check(self, record: dict[str, Any]) -> None:
        if different := differences(record, self.data):
            raise ValueError(
                f"the data changed since the checkpoint ({different}); restore them, or choose another --out"
            )

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        if self.loss.adversary is not None:
            self.loss.adversary.restore(tensors, updates)

    def about(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.module.parameters())
        images = len(self.images)
        return {"options": flat(self.config), "data": self.found, "parameters": parameters, "images_in_data": images}

    def draw(self, step: int) -> tuple[Tensor, list[Tensor]]:
        return _draw(self.config, self.images, step)

    def losses(self, module: nn.Module, batch: tuple[Tensor, list[Tensor]], part: Part) -> Losses:
        images, noise = part.rows(batch[0]), [part.rows(n) for n in batch[1]]
        with mixed_precision(self.config.run.device):
            terms, raw = module(images, noise)
        means = torch.stack([terms[name].detach().float() for name in self.terms])
        return Losses(self.loss.total(terms), means, (images, raw.detach().float(), self.loss.decoded))

    @torch.no_grad()
    def _follow(self, raw: Tensor, momentum: float) -> None:
        """Move the running statistics of the latents."""
        self.module.mean.lerp_(raw.mean((0, 2, 3)), momentum)
        self.module.std.lerp_(raw.std((0, 2, 3)).clamp_min(1e-4), momentum)

    def updated(self, updates: int, rests: list[Any]) -> list[float]:
        hinge = []
        for images, raw, decoded in rests:
            if not self.config.network.freeze_encoder:
                self._follow(raw, 1.0 if updates == 1 else _STATISTICS_MOMENTUM)
            if self.loss.adversary is not None:
                hinge.append(float(self.loss.adversary.learn(images, decoded)))
        return [sum(hinge) / len(hinge)] if hinge else []

    def line(self, means: list[float]) -> dict[str, float]:
        terms = dict(zip(self.names, means, strict=True))
        own = {name: torch.tensor(terms[name]) for name in self.terms}
        return {"loss": round(float(self.loss.total(own)), 5), **terms}

    def rows_of(self, steps: range) -> dict[int, list[int]]:
        return {step: _rows(self.config, len(self.images), step)[0].tolist() for step in steps}

    def tensors(self) -> dict[str, Tensor]:
        return self.loss.adversary.tensors() if self.loss.adversary else {}

    def record(self) -> dict[str, Any]:
        return self.data

    def picture(self, weights: dict[str, Tensor], step: int) -> Path:
        path = Path(self.config.run.out).expanduser() / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        averaged = copy.deepcopy(self.module)
        averaged.load_state_dict({**self.module.state_dict(), **weights})
        _save_reconstructions(averaged, self.images[:16], path, self.config.run.device)
        return path


def _rows(config: TokenizerConfig, images: int, step: int) -> tuple[Tensor, torch.Generator]:
    """The images of a step, and the generator to draw the rest with."""
    generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + step)
    return torch.randint(images, (config.run.batch_size,), generator=generator), generator


def _draw(config: TokenizerConfig, images: np.ndarray, step: int) -> tuple[Tensor, list[Tensor]]:
    """Batch and noise of a step: a function of (seed, step), so that a resumed run sees the same."""
    (chosen, generator), size = _rows(config, len(images), step), config.run.batch_size
    rows, side = chosen.numpy(), config.data.side
    room = config.data.resolution - side + 1
    corners = torch.randint(room, (size, 2), generator=generator).tolist() if room > 1 else ()
    crops = [images[row, y : y + side, x : x + side] for row, (y, x) in zip(rows, corners, strict=False)]
    batch = torch.from_numpy(to_signed(np.stack(crops) if crops else images[rows])).permute(0, 3, 1, 2)
    batch = batch.to(config.run.device, memory_format=torch.channels_last)
    sizes, noise = config.network.resolve(), list[Tensor]()
    side = side // sizes.factor
    for level in range(1 + config.loss.scale_levels):
        shape = (size, sizes.channels, side >> level, side >> level)
        noise.append(torch.randn(shape, generator=generator).to(config.run.device))
    return batch, noise


def _cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return step / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _measure(tokenizer: ConvTokenizer, images: np.ndarray, config: TokenizerConfig) -> None:
    """Statistics of the averaged encoder over some 2,000 images: their 500,000 positions are enough."""
    spread = images[:: max(1, len(images) // 2_000)]  # folders are sorted by class
    batches = (torch.from_numpy(to_signed(part)).permute(0, 3, 1, 2) for part in _parts(spread))
    tokenizer.measure(tokenizer.encode_raw(batch.to(config.run.device)).float() for batch in batches)


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images (N, H, W, 3), a few at a time."""
    count = images_at_once(*images.shape[1:3], most=500)
    return (images[first : first + count] for first in range(0, len(images), count))


def _read_images(config: TokenizerConfig, out: Path) -> tuple[np.ndarray, str, dict[str, Any]]:
    """The images (N, H, W, 3) uint8, a fingerprint of what was read, and what was found, by data set."""
    contents: list[str] = []
    about: dict[str, Any] = {}
    read, side, done = config.data, config.data.resolution, 0
    sources = [load_source(data, read.reading(), max_images=read.max_images) for data in read.data]
    images = _room((sum(map(len, sources)), side, side, 3), out)
    for data, source in zip(read.data, sources, strict=True):
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
    batch = torch.from_numpy(to_signed(images)).permute(0, 3, 1, 2).to(device)
    latents = tokenizer.encode(batch)
    rows = [batch, tokenizer.decode(latents)]
    if min(latents.shape[-2:]) > 1:
        coarse = tokenizer.decode(F.avg_pool2d(latents, 2))
        rows.append(F.interpolate(coarse, size=batch.shape[-2:], mode="nearest"))
    grid(to_pil(torch.cat(rows)), len(images), scale=2).save(path)
