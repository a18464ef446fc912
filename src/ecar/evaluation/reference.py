"""The real images to compare with: a data set, or the mean and covariance of an ADM reference file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ecar.data.source import ImageReport, ReadOptions, iterate_images, load_source
from ecar.evaluation.extractors import SPATIAL_FEATURES, Extractor, extract
from ecar.evaluation.metrics import ADM_NEIGHBOURS, Gaussian
from ecar.evaluation.samples import checked_images, read_npz
from ecar.files.tensors import write_tensors
from ecar.sampling.pictures import channels_first


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images, and where they are known the features (N, D), images and labels themselves.

    Attributes:
        spatial: of the spatial features, where a file of statistics has them: for sFID.
        some: images (M, 3, H, W) uint8, which ADM's files have: for precision and recall.
        neighbours: features (M, D) of these.
    """

    name: str
    gaussian: Gaussian
    spatial: Gaussian | None = None
    some: Tensor | None = None
    neighbours: Tensor | None = None
    count: int | None = None
    features: Tensor | None = None
    images: Tensor | None = None
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    fingerprint: str = ""


class RealImages(NamedTuple):
    """Images (N, 3, H, W) uint8, labels (N,) and class names of a data set."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


def read_images(data: str, read: ReadOptions | str, height: int, width: int, num: int | None) -> RealImages:
    """The images of a data set, read by its options or by the name of a split; ``num`` takes a seeded choice."""
    read = ReadOptions(split=read) if isinstance(read, str) else read
    source = load_source(data, read, max_images=num)
    report = ImageReport()
    images = torch.empty(len(source), 3, height, width, dtype=torch.uint8)  # filled in parts: no second copy
    labels, done = torch.empty(len(source), dtype=torch.int64), 0
    for pixels, some in iterate_images(source, height, width, batch_size=100, report=report):
        images[done : done + len(some)] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        labels[done : done + len(some)] = torch.from_numpy(some)
        done += len(some)
    report.name_skipped()
    return RealImages(images[:done], labels[:done], source.class_names)


def reference_from_images(
    name: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...], extractor: Extractor, cache: Path
) -> Reference:
    """Features of real images, and their statistics."""
    features, fingerprint = kept_features(images, extractor, cache)
    return Reference(
        name, Gaussian.of(features), count=len(images), features=features, images=images, labels=labels,
        class_names=class_names, fingerprint=fingerprint,
    )  # fmt: skip


def kept_features(images: Tensor, extractor: Extractor, cache: Path) -> tuple[Tensor, str]:
    """Features (N, D) of images (N, 3, H, W) uint8, kept in ``cache`` under a fingerprint of pixels and extractor."""
    digest = hashlib.sha256(images.numpy().data)
    digest.update(f"{extractor.name} {extractor.fingerprint} {tuple(images.shape)}".encode())
    fingerprint = digest.hexdigest()[:16]
    path = cache / f"{extractor.name}_{fingerprint}.safetensors"
    features = _cached(path)
    if features is None or features.shape != (len(images), extractor.num_features):
        features = extract(extractor, images)[0]
        cache.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"features": features})
    return features, fingerprint


def _cached(path: Path) -> Tensor | None:
    """The features of a file; None where there is none, or a damaged one: they are computed again."""
    try:
        return load_file(path)["features"] if path.exists() else None
    except (SafetensorError, KeyError, OSError):
        return None


def read_statistics(path: Path, extractor: Extractor) -> Reference:
    """An ADM reference file: ``mu`` (D,) and ``sigma`` (D, D) of Inception features; maybe ``mu_s`` and ``sigma_s`` of
    spatial features, and in ``arr_0`` some of the images (M, H, W, 3) uint8.

    Raises:
        ValueError: wrong keys, shapes or types, values that no covariance has, or statistics of another number of
            features than the extractor's.
    """
    arrays = read_npz(path)
    if "mu" not in arrays or "sigma" not in arrays:
        raise ValueError(f"{path}: no mu and sigma among {sorted(arrays)}; expected an ADM reference file")
    gaussian = _gaussian(path, arrays, "mu", "sigma")
    if len(gaussian.mean) != extractor.num_features:
        raise ValueError(
            f"{path}: statistics of {len(gaussian.mean)} features, but {extractor.name} has {extractor.num_features}; "
            "choose the extractor that they were made with (--extractor inception for ADM's files)"
        )
    spatial = _gaussian(path, arrays, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= arrays.keys() else None
    if spatial is not None and len(spatial.mean) != SPATIAL_FEATURES:
        raise ValueError(f"{path}: mu_s has {len(spatial.mean)} numbers, expected {SPATIAL_FEATURES} spatial features")
    images = None
    if "arr_0" in arrays:
        images = channels_first(checked_images(arrays["arr_0"], f"{path}: arr_0"))
        if len(images) <= ADM_NEIGHBOURS:
            raise ValueError(f"{path}: arr_0 has {len(images)} images, precision needs more than {ADM_NEIGHBOURS}")
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Reference(str(path), gaussian, spatial, some=images, fingerprint=fingerprint)


def _gaussian(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> Gaussian:
    """Two arrays of a file as mean and covariance; ValueError where they are none."""
    mu, sigma = arrays[mean], arrays[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: {mean} is {mu.shape} {mu.dtype} and {covariance} {sigma.shape} {sigma.dtype}, "
            "expected D and D x D real numbers"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(
            f"{path}: {mean} or {covariance} has values that are not finite; the file is damaged, or was made wrong"
        )
    scale = float(np.abs(sigma).max(initial=0.0))
    if (sigma.diagonal() < 0).any() or not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * scale):
        raise ValueError(f"{path}: {covariance} is no covariance: it is not symmetric, or has a negative variance")
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma))


def with_neighbours(found: Reference, extractor: Extractor, cache: Path) -> Reference:
    """What ``read_statistics`` read, with the features of its images."""
    return found if found.some is None else replace(found, neighbours=kept_features(found.some, extractor, cache)[0])
