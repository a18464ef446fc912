"""Does a model copy its training images? Distances of its samples to them, beside those of images it never saw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ecar.evaluation.extractors import Extractor, extract
from ecar.evaluation.metrics import chosen, nearest_distance, nearest_rows
from ecar.sampling.pictures import grid

QUANTILE = 0.01  # of the held-out images are as close to a training image as what counts as a copy
_LOOKED_AT = 2000  # samples, and held-out images, at most: each is seen mirrored too
_FLIPPED = 250  # at once
_COPY = 1e-3  # of the median distance of held-out images: closer is the same image, but for the rounding of features
_PAIRS = 16  # in the picture


WithFeatures = tuple[Tensor, Tensor]  # images and their features


@dataclass(frozen=True)
class Closeness:
    """Distances of images to the closest training image, mirrored ones included.

    Attributes:
        distances: (N,) in the units of the features.
        rows: (N,) int64, place of that training image.
        mirrored: (N,) bool, whether it is the mirror image that is so close.
    """

    distances: Tensor
    rows: Tensor
    mirrored: Tensor


@dataclass(frozen=True)
class Gate:
    """How many samples are closer to a training image than held-out images are.

    Attributes:
        threshold: the smallest distance that ``QUANTILE`` of the held-out images do not exceed.
        share: share of the samples within the threshold.
        held_out_share: share of the held-out images within it: ``QUANTILE`` or a little more; much more where held-out
            images are in the training data themselves.
        excess: ``share`` is more than ``held_out_share`` by over three standard errors of their difference.
    """

    threshold: float
    share: float
    held_out_share: float
    excess: bool


def closeness(images: Tensor, features: Tensor, train: Tensor, extractor: Extractor) -> Closeness:
    """The closest training image in the space of an extractor.

    Args:
        images: (N, 3, H, W) uint8. They are mirrored in place of the training images, which are more.
        features: (N, D) of these.
        train: features (M, D) of the training images.
    """
    distances, rows = nearest_rows(features, train)
    flipped, flipped_rows = nearest_rows(
        torch.cat([extract(extractor, part.flip(-1))[0] for part in images.split(_FLIPPED)]), train
    )
    mirrored = flipped < distances
    return Closeness(torch.where(mirrored, flipped, distances), torch.where(mirrored, flipped_rows, rows), mirrored)


def gate(samples: Tensor, held_out: Tensor) -> Gate:
    """The rule, on distances (N,) of samples and (M,) of held-out images to their closest training images.

    The threshold is the k-th smallest distance of held-out images, k = ceil(``QUANTILE`` M).

    Raises:
        ValueError: no distances on a side.
    """
    if min(len(samples), len(held_out)) == 0:
        raise ValueError(f"no images to compare: {len(samples)} samples, {len(held_out)} held-out images")
    same = _COPY * held_out.median()
    samples, held_out = (torch.where(d <= same, torch.zeros_like(d), d) for d in (samples, held_out))
    threshold = held_out.kthvalue(math.ceil(QUANTILE * len(held_out))).values
    share, usual = (float((d <= threshold).double().mean()) for d in (samples, held_out))
    both = (share * len(samples) + usual * len(held_out)) / (len(samples) + len(held_out))
    error = math.sqrt(both * (1 - both) * (1 / len(samples) + 1 / len(held_out)))
    return Gate(float(threshold), share, usual, share - usual > 3 * error)


def memorisation(
    samples: WithFeatures, held_out: WithFeatures, train: WithFeatures, extractor: Extractor
) -> tuple[dict[str, object], Image.Image]:
    """The gate's record, and a picture of the closest pairs: sample on the left, training image on the right.

    Args:
        samples, held_out, train: images (N, 3, H, W) uint8 with their features (N, D). Of more than 2,000 samples or
            held-out images so many are looked at, always the same ones.
    """
    near, usual = (
        closeness(images[some], features[some], train[1], extractor)
        for images, features in (samples, held_out)
        for some in [chosen(len(images), _LOOKED_AT)]
    )
    ids, found = chosen(len(samples[0]), _LOOKED_AT), gate(near.distances, usual.distances)
    order = near.distances.argsort()[:_PAIRS].tolist()
    closest = [
        {
            "sample": int(ids[i]),
            "training_image": int(near.rows[i]),
            "mirrored": bool(near.mirrored[i]),
            "distance": round(float(near.distances[i]), 4),
        }
        for i in order
    ]
    record: dict[str, object] = {
        "share_of_samples": round(found.share, 4),
        "share_of_held_out": round(found.held_out_share, 4),
        "threshold": round(found.threshold, 4),
        "more_than_held_out": found.excess,
        "median_distance": round(float(near.distances.median()), 4),
        "median_distance_of_held_out": round(float(usual.distances.median()), 4),
        "samples": len(ids),
        "held_out": len(usual.rows),
        "training_images": len(train[0]),
        "closest": closest,
    }
    return record, _pairs(samples[0][ids[order]], train[0][near.rows[order]])


def pixel_distances(samples: Tensor, held_out: Tensor | None, train: Tensor, num: int = 1000) -> dict[str, object]:
    """RMS distance to the closest training image or its mirror image, of ``num`` samples and of as many images that the
    model never saw; all (N, 3, H, W) uint8."""
    sets = {"samples": samples, "reference": held_out}
    found = {name: nearest_distance(x[chosen(len(x), num)], train) for name, x in sets.items() if x is not None}
    count = min(num, len(samples))
    figures = {n: {"median": round(float(d.median()), 4), "min": round(float(d.min()), 4)} for n, d in found.items()}
    return {f"nearest training image, mirrored or not (RMS of pixels in [0, 1], of {count})": figures}


def _pairs(left: Tensor, right: Tensor) -> Image.Image:
    """Images (P, 3, H, W) uint8 side by side, with a white line around each pair; small ones three times enlarged."""
    pairs = F.pad(torch.cat([left, right], dim=-1), (1, 1, 1, 1), value=255)
    images = [Image.fromarray(pair.permute(1, 2, 0).contiguous().numpy()) for pair in pairs]
    return grid(images, min(4, len(images)), scale=3 if left.shape[-1] < 64 else 1)
