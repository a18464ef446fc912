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

from ecar.config import ModelConfig
from ecar.data.latents import MemoryTable
from ecar.evaluation.extractors import Extractor, extract, get_extractor
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.sampling.pictures import from_decoded
from ecar.sampling.pipeline import Output, Pipeline
from ecar.tokenizers import Tokenizer
from ecar.training.build import build_config
from ecar.training.config import TrainConfig
from ecar.training.engine.trainer import Trainer
from ecar.training.generator import Generator

_WARM, _TIMED = 2, 3  # steps
_SECONDS = 15.0  # of timed steps, at most
_SAMPLES = 4  # drawn at a time
EXTRACTOR = "efficientnet-lite0"


@dataclass(frozen=True)
class Reconstruction:
    """Pictures through a tokenizer and back.

    Attributes:
        images: (N, 3, H, W) uint8.
        psnr: of all pictures together, in dB; infinite where nothing is lost.
        encode, decode: seconds per picture.
    """

    images: Tensor
    psnr: float
    encode: float
    decode: float


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor, device: str) -> Reconstruction:
    """Images (N, 3, H, W) uint8 there and back.

    Raises:
        ValueError: sides that do not divide, or coloured pictures for a grey tokenizer.
    """
    tokenizer = tokenizer.to(device).eval()
    pixels = images.to(device).float() / 127.5 - 1
    tokenizer.check_images(pixels)
    latents, encode = timed(lambda: tokenizer.encode(pixels), device)
    decoded, decode = timed(lambda: tokenizer.decode(latents), device)
    back = from_decoded(decoded).cpu()
    tokenizer.to("cpu")
    error = (back.double() - images.double()).square().mean().item()
    psnr = math.inf if error == 0 else 10 * math.log10(255**2 / error)
    return Reconstruction(back, psnr, encode / len(images), decode / len(images))


@dataclass(frozen=True)
class Speed:
    """Seconds of this machine, and the size of the model they are of.

    Attributes:
        start: before the first steps are taken: building, compiling.
        step: of a training step.
        sample: of a sample without guidance, decoder included.
        parameters: of the model.
    """

    start: float
    step: float
    sample: float
    parameters: int


def training_speed(values: dict[str, Any], tokenizer: Tokenizer, classes: int) -> Speed:
    """Take a few steps of a training with the options ``values``, on noise, and draw a few samples."""
    with TemporaryDirectory() as folder:
        config = TrainConfig.of(**{**values, "data": folder, "out": folder}).resolve()
        shape = build_config(config, tokenizer)
        names = tuple(map(str, range(classes)))
        shape = shape.replace(
            num_classes=classes, class_names=names, velocity_std=(1.0,) * len(shape.stages.sides),
            tokenizer=tokenizer.fingerprint(),
        )  # fmt: skip
        start = time.perf_counter()
        device = config.run.device
        model = build_model(shape).to(device)
        task = Generator(config, model, _noise(config.run.batch_size, shape), tokenizer, Path(folder))
        trainer = Trainer(task, config.run, Path(folder), ema=config.optimizer.ema, scale=config.scale)
        seconds: list[float] = []
        with task:
            while len(seconds) < _WARM + _TIMED and (len(seconds) <= _WARM or sum(seconds[_WARM:]) < _SECONDS):
                trainer.step += 1
                seconds.append(timed(trainer.train_step, device)[1])
        begun = time.perf_counter() - start - sum(seconds[_WARM:])
        sample = _sampling(task.averaged(trainer.averaged()), tokenizer)
        return Speed(begun, median(seconds[_WARM:]), sample, model.num_parameters())


def _noise(count: int, model: ModelConfig) -> MemoryTable:
    side = model.stages.sides[-1]
    return MemoryTable(
        latents=torch.randn(1, count, model.channels, *side).half(),
        labels=torch.arange(count) % max(1, model.num_classes),
        class_names=model.class_names,
        image_side=model.image_side,
        tokenizer=model.tokenizer,
    )


def _sampling(model: StageModel, tokenizer: Tokenizer) -> float:
    pipe = Pipeline(model, tokenizer)
    labels = [0] * _SAMPLES if model.config.num_classes else None
    device = model.device.type

    def draw() -> Output:
        return pipe(labels=labels, seeds=range(_SAMPLES))

    draw()
    seconds = timed(draw, device)[1] / _SAMPLES
    tokenizer.to("cpu")
    return seconds


def extractor_speed(images: Tensor, device: str) -> tuple[Extractor | None, float, str]:
    """The network that samples are judged by, its seconds per image, and why there is none."""
    try:
        extractor = get_extractor(EXTRACTOR, device=device)
    except (ValueError, ImportError) as error:
        return None, 0.0, str(error)
    extract(extractor, images[:1])
    return extractor, timed(lambda: extract(extractor, images), device)[1] / len(images), ""


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What ``work`` gives, and its seconds; a GPU is waited for."""
    start = time.perf_counter()
    found = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return found, time.perf_counter() - start
