"""Samples of a model as its training data (``ecar train --init-from MODEL --data self:NUM``).

What a short training on them changes in the weights is, but for its sign, what the model lacks: ``ecar neon``
extrapolates it negatively (2510.03597).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import SamplingConfig
from ecar.devices import mixed_precision
from ecar.files.access import check_readable
from ecar.files.tensors import write_tensors
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.sampling.loop import check_settings, sample_latents
from ecar.sampling.noise import draw_noise
from ecar.training.config import Training
from ecar.training.finetune import Source

_BATCH = 128
_FIRST_SEED = 2**52  # far from those that evaluations count from 0: they would measure images that were trained on
_FILE = "samples.safetensors"  # in RUN/init


def keep_own_samples(config: Training, source: Source) -> None:
    """Draw ``config.data.own_samples`` samples of the source and write them to ``RUN/init``, unless they are there.

    Raises:
        ValueError: a model that cannot be trained on what it draws, or the samples that a run began with are gone.
    """
    path, who = _kept(config, source)
    if _metadata(path) == who:
        return
    if source.weights is None:
        raise ValueError(f"{path}: not the samples that the run began with; restore them, or choose another --out")
    if config.model.image_side != source.config.image_side:
        raise ValueError(f"--data {config.data.data}: {source.name} draws images of {source.config.image_side}")
    model = build_model(source.config)
    model.load_state_dict(source.weights)
    latents, labels = draw_own_samples(model, config)
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, {"latents": latents, "labels": labels}, who)


def read_own_samples(config: Training, source: Source) -> tuple[Tensor, Tensor, str]:
    """What ``keep_own_samples`` wrote: latents (N, C, h, w) float16, labels (N,), and a fingerprint of them."""
    path, who = _kept(config, source)
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents"), file.get_tensor("labels"), "self " + " ".join(who.values())


@torch.no_grad()
def draw_own_samples(model: StageModel, config: Training) -> tuple[Tensor, Tensor]:
    """As many samples as ``--data`` says by the settings of ``model``, in its steps if given, classes in turn:
    latents (N, C, h, w) float16 and labels (N,), both on the CPU.

    Raises:
        ValueError: as ``_settings``.
    """
    num, settings = config.data.own_samples, _settings(config, model)
    model = model.to(config.run.device).eval()
    if config.run.compile:
        model.compile_blocks()
    labels = torch.arange(num) % max(1, model.config.num_classes)
    first, parts = _FIRST_SEED + config.run.seed % 2**20 * 2**31, []
    for rows in tqdm(torch.arange(num).split(_BATCH), desc="sampling", disable=None):
        noise = draw_noise((first + rows).tolist(), model.plan, model.config.channels)
        with mixed_precision(config.run.device, wanted=config.scale.dtype == "bf16"):
            latents = sample_latents(model, labels[rows].to(config.run.device), noise, settings)
        parts.append(latents.half().cpu())
    return torch.cat(parts), labels


def _settings(config: Training, model: StageModel) -> SamplingConfig:
    """How samples are drawn.

    Raises:
        ValueError: no settings to draw by, steps of which there are too few or many, or a model distilled to fixed
            steps, whose velocities are means over them.
    """
    settings = model.config.sampling
    if settings is None or settings.fixed_steps:
        why = "names no sampling settings" if settings is None else f"was distilled to {settings.steps} steps"
        raise ValueError(f"--data {config.data.data}: the model {why}, so that it cannot learn from its own samples")
    if config.data.own_steps:
        settings = dataclasses.replace(settings, steps=config.data.own_steps)
    check_settings(settings, len(model.plan))
    return settings


def _kept(config: Training, source: Source) -> tuple[Path, dict[str, str]]:
    """The file of a run's samples, and what its metadata say: who drew how many from which seeds."""
    who = {"weights": source.fingerprint, "num": str(config.data.own_samples), "seed": str(config.run.seed)}
    if config.data.own_steps:
        who["steps"] = ",".join(map(str, config.data.own_steps))
    return Path(config.run.out).expanduser() / "init" / _FILE, who


def _metadata(path: Path) -> dict[str, str] | None:
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None
