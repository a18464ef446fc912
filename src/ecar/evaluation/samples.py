"""Samples to evaluate, and the files that they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ecar.data.ahead import in_order
from ecar.data.source import load_source
from ecar.devices import images_at_once
from ecar.evaluation.metrics import chosen
from ecar.files.images import BadImageError, decode_image
from ecar.sampling.pictures import channels_first, from_decoded
from ecar.sampling.pipeline import Pipeline

_AT_ONCE = 1000  # images in memory twice


@dataclass(frozen=True)
class Samples:
    """Images (N, 3, H, W) uint8, labels (N,) int64 or None (no classes), the seconds that making them took (0: read),
    the mean number of candidates drawn for one, and the names of the classes where the samples have some."""

    images: Tensor
    labels: Tensor | None
    seconds: float = 0.0
    drawn: float = 1.0
    class_names: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of the pixels and labels."""
        digest = hashlib.sha256()
        for part in self.images.split(_AT_ONCE):
            digest.update(part.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def read_samples(path: Path) -> Samples:
    """Samples that somebody made: an ``.npz`` in ADM's format (``arr_0`` (N, H, W, 3) uint8, and where known ``labels``
    or ``arr_1`` (N,)), an ``.npy`` of such images, or a folder of pictures of one size, whose subfolders are classes.

    Raises:
        ValueError: wrong keys, shapes, types, labels or sizes.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".npy":
        return Samples(channels_first(checked_images(_read_npy(path), str(path))), None)
    arrays = read_npz(path)
    if "arr_0" not in arrays:
        raise ValueError(
            f"{path}: no arr_0 among {sorted(arrays)}; expected images N x H x W x 3 uint8 under that name"
        )
    images = checked_images(arrays["arr_0"], f"{path}: arr_0")
    name = "labels" if "labels" in arrays else "arr_1"
    labels = arrays.get(name)
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: {name} are {labels.shape} {labels.dtype}, expected {len(images)} integers")
    known = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return Samples(channels_first(images), known)


def checked_images(images: np.ndarray, where: str) -> np.ndarray:
    """The same; ValueError unless they are (N, H, W, 3) uint8."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"{where} is {images.shape} {images.dtype}, expected N x H x W x 3 uint8")
    return images


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # damaged files make numpy raise whatever it stumbles over
        raise ValueError(f"{path}: not a readable .npy file ({error or type(error).__name__})") from None


def _read_folder(path: Path) -> Samples:
    """Pictures as they are: none is scaled or left out."""
    source = load_source(str(path))
    images: list[np.ndarray] = []
    for (index, _), image in in_order(lambda item: decode_image(item[1]), source.encoded()):
        if isinstance(image, BadImageError):
            raise ValueError(f"{source.path(index)}: {image}; samples are compared all together, or not at all")
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            (height, width, _), (first_height, first_width, _) = images[-1].shape, images[0].shape
            raise ValueError(
                f"{source.path(index)} has {width}x{height} pixels, {source.path(0)} {first_width}x{first_height}; "
                "samples are compared as they are: give pictures of one size"
            )
    labels = torch.from_numpy(source.labels) if source.class_names else None
    return Samples(channels_first(np.stack(images)), labels, class_names=source.class_names)


def write_samples(path: Path, samples: Samples) -> None:
    """``arr_0`` (and ``labels``), as ADM's evaluator and ``read_samples`` read them."""
    arrays = {"arr_0": samples.images.permute(0, 2, 3, 1).numpy()}
    if samples.labels is not None:
        arrays["labels"] = samples.labels.numpy()
    write_npz(path, arrays)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file that is there whole or not at all; arrays that are mapped into memory are not read into it as a whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def choose(samples: Samples, num: int) -> Samples:
    """``num`` of the samples at random, always the same ones; ValueError if there are fewer."""
    if len(samples.images) < num:
        raise ValueError(f"--num {num}: there are only {len(samples.images)} images")
    if len(samples.images) == num:
        return samples
    rows = chosen(len(samples.images), num)
    labels = None if samples.labels is None else samples.labels[rows]
    return replace(samples, images=samples.images[rows], labels=labels)


@torch.no_grad()
def reconstruct(pipe: Pipeline, images: Tensor) -> Samples:
    """Images (N, 3, H, W) uint8 through encoder and decoder: no model can do better than its tokenizer."""
    parts = []
    for part in images.split(images_at_once(*images.shape[-2:], most=250)):
        latents = pipe.tokenizer.encode((part.float() / 127.5 - 1).to(pipe.model.device))
        parts.append(from_decoded(pipe.decoder.decode(latents)))
    return Samples(torch.cat(parts), None)


def read_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file, or those of ``names`` that are there, never unpickled; ValueError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ValueError("a single array")
            return {name: file[name] for name in file.files if names is None or name in names}
    except Exception as error:  # damaged files make zipfile, zlib and numpy raise whatever they stumble over
        raise ValueError(f"{path}: not a readable .npz file ({error or type(error).__name__})") from None
