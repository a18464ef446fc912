"""Samples to be judged: made from a model, resumable per image id, or read from a file.

Image i of N has class i mod K and seed ``seed + i``, so that every prefix is balanced and no image depends on how the
work was cut into batches.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import SamplingConfig, differences
from ecar.data.ahead import in_order
from ecar.data.source import load_source
from ecar.devices import images_at_once
from ecar.evaluation.metrics import chosen
from ecar.files.images import BadImageError, decode_image
from ecar.files.records import read_json
from ecar.sampling.pictures import from_decoded
from ecar.sampling.pipeline import Pipeline, Sampler


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
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def make_samples(
    pipe: Pipeline,
    num: int,
    *,
    seed: int,
    settings: SamplingConfig,
    folder: Path,
    record: dict[str, object],
    batch: int,
    sampler: Sampler | None = None,
) -> Samples:
    """Sample ``num`` images into ``folder``, a file per batch; images that are there already are not made again.

    Args:
        record: everything that decides what the images are; a folder made with another record is refused.
        batch: images per file and samples per forward pass; another one than before is no matter.
        sampler: what draws, where it is not ``pipe`` alone: ``ecar.refine.BestOf`` around it.

    Raises:
        ValueError: the folder holds other samples, or its files have images missing, doubled or damaged.
    """
    check_folder(folder, record, seed=seed, settings=settings)
    path = folder / "samples.json"
    if not path.exists():
        _write_text(path, json.dumps(_whole(record, seed, settings), indent=2) + "\n")
    classes = max(1, pipe.model.config.num_classes)
    there = {int(i) for file in folder.glob("ids_*.npz") for i in _read_part(file)["ids"]}
    missing = [i for i in range(num) if i not in there]
    for first in tqdm(range(0, len(missing), batch), desc="sampling", disable=None):
        ids = missing[first : first + batch]
        labels = [i % classes if pipe.model.config.num_classes else None for i in ids]
        start = time.perf_counter()
        output = (sampler or pipe)(labels, seeds=[seed + i for i in ids], settings=settings, batch_size=batch)
        seconds = time.perf_counter() - start
        images = np.stack([np.asarray(image) for image in output.images])
        file = folder / f"ids_{ids[0]:08d}.npz"
        arrays = {"images": images, "labels": output.labels, "ids": ids, "drawn": output.drawn}
        _write_npz(file, **{name: np.asarray(array) for name, array in arrays.items()}, seconds=seconds)
    samples = collect(folder, num)
    return samples if pipe.model.config.num_classes else replace(samples, labels=None)


def check_folder(folder: Path, record: dict[str, object], *, seed: int, settings: SamplingConfig) -> None:
    """Whether ``make_samples`` with these can write into ``folder``, which is made where there is none. Cheap.

    Raises:
        ValueError: it cannot be made, or holds other samples.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no folder can be made there ({error.strerror}); choose another --out") from None
    path = folder / "samples.json"
    if path.exists():
        there = read_json(path, "delete the folder, or choose another --out")
        if changed := differences(there, _whole(record, seed, settings)):
            raise ValueError(f"{folder} holds other samples ({changed}); delete it or choose another --out")
    elif any(folder.glob("ids_*.npz")):
        raise ValueError(f"{folder} holds samples without samples.json; delete it or choose another --out")


def _whole(record: dict[str, object], seed: int, settings: SamplingConfig) -> dict[str, Any]:
    """All that decides what the images are, as JSON gives it back."""
    return dict(json.loads(json.dumps({**record, "seed": seed, "settings": settings.to_json()})))


def collect(folder: Path, num: int) -> Samples:
    """The samples of ids 0 .. num - 1 in ``folder``.

    Raises:
        ValueError: ids missing or doubled.
    """
    images, labels, drawn = torch.empty(0), np.zeros(num, np.int64), np.zeros(num)
    found, seconds = [np.zeros(0, np.int64)], 0.0
    for file in sorted(folder.glob("ids_*.npz")):  # one at a time: together they are as large as the result
        part = _read_part(file)
        keep = part["ids"] < num
        if len(found) == 1:
            images = torch.empty(num, 3, *part["images"].shape[1:3], dtype=torch.uint8)
        rows = part["ids"][keep]
        images[torch.from_numpy(rows)] = _to_tensor(part["images"][keep])
        labels[rows], drawn[rows] = part["labels"][keep], part["drawn"][keep]
        found.append(part["ids"])
        seconds += float(part["seconds"]) * float(keep.mean())
    ids = np.concatenate(found)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{folder}: image {values[counts > 1][0]} is there twice; delete one of the files")
    missing = np.setdiff1d(np.arange(num), values)
    if len(missing):
        raise ValueError(f"{folder}: {len(missing)} of {num} images are missing, the first is {missing[0]}")
    return Samples(images, torch.from_numpy(labels), seconds, float(drawn.mean()))


def read_samples(path: Path) -> Samples:
    """Samples that somebody made: an ``.npz`` in ADM's format (``arr_0`` (N, H, W, 3) uint8, and where known ``labels``
    or ``arr_1`` (N,)), an ``.npy`` of such images, or a folder of pictures of one size, whose subfolders are classes.

    Raises:
        ValueError: wrong keys, shapes, types, labels or sizes.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".npy":
        return Samples(_to_tensor(_checked_images(_read_npy(path), str(path))), None)
    arrays = read_npz(path)
    if "arr_0" not in arrays:
        raise ValueError(
            f"{path}: no arr_0 among {sorted(arrays)}; expected images N x H x W x 3 uint8 under that name"
        )
    images = _checked_images(arrays["arr_0"], f"{path}: arr_0")
    name = "labels" if "labels" in arrays else "arr_1"
    labels = arrays.get(name)
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: {name} are {labels.shape} {labels.dtype}, expected {len(images)} integers")
    known = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return Samples(_to_tensor(images), known)


def _checked_images(images: np.ndarray, where: str) -> np.ndarray:
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
            raise ValueError(f"{source.path(index)}: {image}; samples are judged all together, or not at all")
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            (height, width, _), (first_height, first_width, _) = images[-1].shape, images[0].shape
            raise ValueError(
                f"{source.path(index)} has {width}x{height} pixels, {source.path(0)} {first_width}x{first_height}; "
                "samples are judged as they are: give pictures of one size"
            )
    labels = torch.from_numpy(source.labels) if source.class_names else None
    return Samples(_to_tensor(np.stack(images)), labels, class_names=source.class_names)


def write_samples(path: Path, samples: Samples) -> None:
    """``arr_0`` (and ``labels``), as ADM's evaluator and ``read_samples`` read them."""
    arrays = {"arr_0": samples.images.permute(0, 2, 3, 1).contiguous().numpy()}
    if samples.labels is not None:
        arrays["labels"] = samples.labels.numpy()
    _write_npz(path, **arrays)


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


def _to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, never unpickled; ValueError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ValueError("a single array")
            return {name: file[name] for name in file.files}
    except Exception as error:  # damaged files make zipfile, zlib and numpy raise whatever they stumble over
        raise ValueError(f"{path}: not a readable .npz file ({error or type(error).__name__})") from None


def _read_part(path: Path) -> dict[str, np.ndarray]:
    """A file of ``make_samples``; ValueError if it is damaged."""
    part = read_npz(path)
    if missing := {"images", "labels", "ids", "drawn", "seconds"} - part.keys():
        raise ValueError(f"{path}: no {', '.join(sorted(missing))} in it; delete the file, its images are made again")
    if not len(part["images"]) == len(part["labels"]) == part["ids"].size > 0:
        raise ValueError(f"{path}: damaged; delete the file, its images are made again")
    return part


def _write_npz(path: Path, **arrays: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
