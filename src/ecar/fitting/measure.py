"""What is measured before a plan is made: how well tokenizers give pictures back, and how fast this machine is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ecar.data.latents import LatentTable
from ecar.evaluation.extractors import Extractor, extract, get_extractor
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.sampling.pictures import from_decoded
from ecar.sampling.pipeline import Output, Pipeline
from ecar.tokenizers import Tokenizer
from ecar.training.build import build_config, with_data
from ecar.training.config import TrainConfig
from ecar.training.engine.trainer import Trainer
from ecar.training.finetune import Source
from ecar.training.generator import Generator
from ecar.training.watch import HeldOutLoss

_WARM, _TIMED = 2, 3  # steps, at least
_MOST_STEPS = 60  # of a trial
_AVERAGE = 0.5  # of the weights: a trial is short
_SAMPLES = 2  # drawn at a time
EXTRACTOR = "efficientnet-lite0"


@dataclass(frozen=True)
class Reconstruction:
    """Pictures through a tokenizer and back.

    Attributes:
        images: (N, 3, H, W) uint8.
        psnr: of all pictures together, in dB; infinite where nothing is lost.
        encode, decode: seconds per picture.
        latents: (N, C, h, w), in between.
    """

    images: Tensor
    psnr: float
    encode: float
    decode: float
    latents: Tensor


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor, device: str) -> Reconstruction:
    """Images (N, 3, H, W) uint8 there and back.

    Raises:
        ValueError: sides that do not divide, or coloured pictures for a grey tokenizer.
    """
    tokenizer = tokenizer.to(device).eval()
    latents, encode = encoded(tokenizer, images, device)
    decoded, decode = timed(lambda: tokenizer.decode(latents), device)
    back = from_decoded(decoded).cpu()
    tokenizer.to("cpu")
    error = (back.double() - images.double()).square().mean().item()
    psnr = math.inf if error == 0 else 10 * math.log10(255**2 / error)
    return Reconstruction(back, psnr, encode, decode / len(images), latents.cpu())


@torch.no_grad()
def encoded(tokenizer: Tokenizer, images: Tensor, device: str) -> tuple[Tensor, float]:
    """Latents (N, C, h, w) of images (N, 3, H, W) uint8, and seconds for one.

    Raises:
        ValueError: as ``reconstruct``.
    """
    pixels = images.to(device).float() / 127.5 - 1
    tokenizer.check_images(pixels)
    latents, seconds = timed(lambda: tokenizer.encode(pixels), device)
    return latents, seconds / len(images)


@dataclass(frozen=True)
class Trial:
    """A few steps of a training: how fast they are, and how far they lead.

    Attributes:
        start: seconds before the first steps are taken: building, compiling.
        step: seconds of a training step.
        update: seconds of it that the optimizer takes, whatever the size of the batch.
        sample: seconds of a sample without guidance, decoder included.
        parameters: of the model.
        steps: that were taken.
        loss: mean squared error of the velocity on held-out pictures after them, summed over the stages.
    """

    start: float
    step: float
    update: float
    sample: float
    parameters: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Probe:
    """What trials are made with.

    Attributes:
        tokenizer: of the latents.
        train, held_out: some of the pictures.
        seconds: for the timed steps of a trial, about.
    """

    tokenizer: Tokenizer
    train: LatentTable
    held_out: LatentTable
    seconds: float


def try_training(values: dict[str, Any], probe: Probe, steps: int = 0) -> Trial:
    """Take steps of a training with the options ``values``: ``steps`` of them, or as many as the time of ``probe`` is
    enough for. Then draw a few samples."""
    with TemporaryDirectory() as folder:
        out = Path(folder)
        config = TrainConfig.of(**{**values, "data": folder, "out": folder, "max_steps": _MOST_STEPS})
        start = time.perf_counter()
        source = Source.find(config, out)
        options = source.with_defaults(config) if source else config.resolve()
        shape = with_data(build_config(options, probe.tokenizer), probe.train)
        device = options.run.device
        model = (source.build(options, shape) if source else build_model(shape)).to(device)
        task = Generator(options, model, probe.train, probe.tokenizer, out, source)
        trainer = Trainer(task, options.run, out, ema=(_AVERAGE,), scale=options.scale)
        seconds: list[float] = []
        with task:
            while len(seconds) < (steps or _MOST_STEPS):
                if not steps and len(seconds) >= _WARM + _TIMED and sum(seconds[_WARM:]) >= probe.seconds:
                    break
                trainer.step += 1
                seconds.append(timed(trainer.train_step, device)[1])
        begun = time.perf_counter() - start - sum(seconds[_WARM:])
        found = HeldOutLoss(task, probe.held_out)(trainer.averaged())
        scales = enumerate(model.config.velocity_std, 1)  # in units of the latents: sources have scales of their own
        loss = sum(found[f"val_loss_{k}"] * std**2 for k, std in scales)
        sample = _sampling(task.averaged(trainer.averaged()), probe.tokenizer)
        step = median(seconds[_WARM:] or seconds)
        update = sum(timed(optimizer.step, device)[1] for optimizer in trainer.optimizers)
        return Trial(begun, step, min(update, step), sample, model.num_parameters(), len(seconds), loss)


def table_of(latents: Tensor, labels: Tensor, names: tuple[str, ...], tokenizer: Tokenizer, side: int) -> LatentTable:
    """Latents (N, C, h, w) of a trial; on unit scale also where the tokenizer's statistics are not known yet."""
    if not tokenizer.measured:
        shift, spread = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
        latents = (latents - shift) / spread.clamp_min(1e-4)
    return LatentTable(
        latents=latents[None].half().cpu(), labels=labels, class_names=names, image_side=(side, side),
        tokenizer=tokenizer.fingerprint(),
    )  # fmt: skip


def _sampling(model: StageModel, tokenizer: Tokenizer) -> float:
    pipe = Pipeline(model, tokenizer)
    labels = [0] * _SAMPLES if model.config.num_classes else None
    device = model.device.type

    def draw() -> Output:
        return pipe(labels=labels, seeds=range(_SAMPLES), guidance=1.0)

    if device == "cuda":  # kernels are loaded
        draw()
    seconds = timed(draw, device)[1] / _SAMPLES
    tokenizer.to("cpu")
    return seconds


def find_extractor(device: str) -> tuple[Extractor | None, str]:
    """The network that samples are judged by, and why there is none."""
    try:
        return get_extractor(EXTRACTOR, device=device), ""
    except (ValueError, ImportError) as error:
        return None, str(error)


def extractor_speed(extractor: Extractor | None, images: Tensor, device: str) -> float:
    """Seconds per image."""
    if extractor is None:
        return 0.0
    extract(extractor, images[:1])
    return timed(lambda: extract(extractor, images), device)[1] / len(images)


def difference(extractor: Extractor, ours: Tensor, theirs: Tensor) -> float:
    """Mean squared difference between the features of pictures (N, 3, H, W) uint8 and of others, each to each."""
    one, other = (extract(extractor, images)[0] for images in (ours, theirs))
    return float((one - other).square().mean())


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What ``work`` gives, and its seconds; a GPU is waited for."""
    start = time.perf_counter()
    found = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return found, time.perf_counter() - start
