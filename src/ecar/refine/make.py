"""Making a critic: real images, as many samples of the model, and a fit between the features of both."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar import __version__
from ecar.config import SamplingConfig
from ecar.data.reading import ReadOptions
from ecar.evaluation.figures import check_classes
from ecar.evaluation.reference import read_images
from ecar.pretrained.folders import weights_fingerprint
from ecar.refine.critic import Critic, Features
from ecar.refine.fit import fit_critic
from ecar.sampling.noise import MAX_SEED
from ecar.sampling.pictures import from_pil
from ecar.sampling.pipeline import Pipeline

_FEWEST = 100  # images on a side


def make_critic(
    pipe: Pipeline,
    data: str,
    *,
    settings: SamplingConfig | None = None,
    num: int = 25_000,
    power: float = 2.0,
    seed: int = 1_000_000_000,
    batch_size: int = 250,
    read: ReadOptions | None = None,
) -> Critic:
    """Learn to tell a model's samples from real images: what ``BestOf`` chooses by. ``Critic.save`` writes it.

    Args:
        pipe: the model, without an adapter.
        data: real images, those that it was trained on: image folder, WebDataset tars, parquet or Hub data set.
        settings: how samples are drawn here, and later; default: the model's own.
        num: samples to draw, and real images to take at random, at most; at least 100.
        power: exponent of the ratio of likelihoods by which candidates are chosen, in (0, 10].
        seed: of the first sample, far from those that are drawn later.
        batch_size: samples computed at once.
        read: which part of the data are images and labels.

    Raises:
        ValueError: values out of range, fewer than 100 images, data of other classes than the model's, or features
            whose package is missing.
    """
    _check(num, power, seed, batch_size)
    features = Features().to(pipe.model.device)  # first: it may be missing
    config, settings = pipe.model.config, settings or pipe.settings()
    images, labels, names = read_images(data, read or ReadOptions(), *config.image_side, None)
    if config.num_classes:
        check_classes(config, data, names)
    else:
        labels = torch.zeros_like(labels)
    if len(images) < _FEWEST:
        raise ValueError(f"`data` {data} has {len(images)} images; a critic needs {_FEWEST} at least")
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:num]
    labels = labels[rows]
    real = torch.cat([features(images[some]).cpu() for some in rows.split(batch_size)])
    del images  # before others are drawn
    drawn = _samples(pipe, settings, labels, features, seed, batch_size)
    fit = fit_critic(real, labels, drawn, labels, config.num_classes)
    about = {
        "model": pipe.name if "/" not in pipe.name else "",  # else a place on some machine
        "weights": weights_fingerprint(pipe.name),
        "settings": settings.to_json(),
        "power": power,
        "images": len(rows),
        "accuracy": round(fit.accuracy, 4),
        "seed": seed,
        "ecar": __version__,
    }
    return Critic(features, fit.tensors, about).eval()


def _check(num: int, power: float, seed: int, batch_size: int) -> None:
    if num < _FEWEST or batch_size < 1:
        raise ValueError(f"`num` must be at least {_FEWEST} and `batch_size` at least 1")
    if not 0 < power <= 10:
        raise ValueError(f"`power` must be above 0 and at most 10, got {power}")
    if not 0 <= seed <= MAX_SEED - num + 1:
        raise ValueError(f"`seed` must be in 0..{MAX_SEED - num + 1} with `num` {num}")


def _samples(
    pipe: Pipeline, settings: SamplingConfig, labels: Tensor, features: Features, seed: int, batch_size: int
) -> Tensor:
    """Features of a sample for each label."""
    parts = []
    for first in tqdm(range(0, len(labels), batch_size), desc="sampling", disable=None):
        some = labels[first : first + batch_size].tolist()
        out = pipe(
            some if pipe.model.config.num_classes else None, seeds=range(seed + first, seed + first + len(some)),
            settings=settings, batch_size=batch_size,
        )  # fmt: skip
        parts.append(features(from_pil(out.images)).cpu())
    return torch.cat(parts)
