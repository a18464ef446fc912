"""Samples of a model, made into a folder by any number of processes: a file per batch, resumable per image id.

Image i has seed ``seed + i``. Batches are cut at multiples of their size whoever draws them and whatever is there
already, so that an image is the same, bit for bit on a CPU, in one process or in eight, killed or not.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ecar.config import SamplingConfig, differences
from ecar.evaluation.samples import Samples, read_npz, write_npz, write_samples
from ecar.files.lock import run_lock
from ecar.files.records import read_json, write_atomically
from ecar.processes.watchdog import FORWARD, WAIT, Watchdog
from ecar.processes.world import World
from ecar.sampling.classes import Label
from ecar.sampling.pipeline import Pipeline, Sampler

_ALONE = World()
_PATIENCE = 8.0  # of the watchdog: a large batch on a CPU takes longer than a step of training
_KEYS = ("ids", "labels", "drawn", "seconds")


def make_samples(
    pipe: Pipeline, labels: Sequence[Label], folder: Path, out: Path | None = None, *, world: World = _ALONE,
    **options: Any,
) -> tuple[int, Samples] | None:  # fmt: skip
    """Draw an image per label into ``folder``, every process its batches, and collect them in one file; called again,
    it goes on with what is there.

    Args:
        out: the file, as of ``collect``.
        options: of ``draw_samples``.

    Returns:
        On rank 0 how many images were missing, and all samples; else None.

    Raises:
        ValueError: the folder holds other samples, or another process writes into it.
    """
    with ExitStack() as lock:
        if world.rank == 0:  # two commands would both make what is missing
            folder.mkdir(exist_ok=True)
            lock.enter_context(run_lock(folder))
        missing = draw_samples(pipe, labels, folder=folder, world=world, **options)
        if world.rank:
            return None
        return missing, collect(folder, len(labels), out, labelled=pipe.model.config.num_classes > 0)


def balanced(pipe: Pipeline, num: int) -> list[int | None]:
    """Image i has class i mod K, so that every prefix is balanced."""
    classes = pipe.model.config.num_classes
    return [i % classes if classes else None for i in range(num)]


def configuration(pipe: Pipeline) -> str:
    """SHA-256 (16 hex digits) of what makes images of the weights: configuration, tokenizer and decoder."""
    parts = json.dumps(pipe.model.config.to_json(), sort_keys=True), pipe.tokenizer.fingerprint()
    return hashlib.sha256(" ".join((*parts, pipe.decoder.fingerprint())).encode()).hexdigest()[:16]


def draw_samples(
    pipe: Pipeline, labels: Sequence[Label], *, seed: int, settings: SamplingConfig, folder: Path,
    record: dict[str, object], batch: int, sampler: Sampler | None = None, world: World = _ALONE,
) -> int:  # fmt: skip
    """Sample an image per label into ``folder``, a file per batch; images that are there already are not made again.

    Args:
        record: everything that decides what the images are; a folder made with another record is refused. Rank 0's
            counts.
        batch: images per file and samples per forward pass; another one than before is no matter.
        sampler: what draws, where it is not ``pipe`` alone: ``ecar.refine.BestOf`` around it.
        world: processes that share the batches; when it returns, all of them are done.

    Returns:
        How many images were missing.

    Raises:
        ValueError: the folder holds other samples, or files that are damaged.
    """
    there = set(world.from_first(lambda: _begin(folder, record, seed, settings)))
    cut = [[i for i in range(f, min(f + batch, len(labels))) if i not in there] for f in range(0, len(labels), batch)]
    mine = world.share([ids for ids in cut if ids])
    with Watchdog(world, patience=_PATIENCE) as watchdog:
        for number, ids in enumerate(tqdm(mine, desc="sampling", disable=True if world.rank else None)):
            watchdog.at(number, FORWARD)
            some, start = [labels[i] for i in ids], time.perf_counter()
            output = (sampler or pipe)(some, seeds=[seed + i for i in ids], settings=settings, batch_size=batch)
            arrays = {
                "images": np.stack([np.asarray(image) for image in output.images]),
                "labels": np.asarray(output.labels),
                "ids": np.asarray(ids),
                "drawn": np.asarray(output.drawn),
                "seconds": np.asarray(time.perf_counter() - start),
            }
            write_npz(folder / f"ids_{ids[0]:08d}.npz", arrays)
        watchdog.at(sys.maxsize, WAIT)
        world.meet("samples")
    return sum(map(len, cut))


def _begin(folder: Path, record: dict[str, object], seed: int, settings: SamplingConfig) -> list[int]:
    """Ids of the images that are there."""
    check_folder(folder, record, seed=seed, settings=settings)
    for left in folder.glob("*.tmp"):  # by a kill
        left.unlink()
    path = folder / "samples.json"
    if not path.exists():
        write_atomically(path, (json.dumps(_whole(record, seed, settings), indent=2) + "\n").encode())
    return [int(i) for file in sorted(folder.glob("ids_*.npz")) for i in _read_part(file)["ids"]]


def check_folder(folder: Path, record: dict[str, object], *, seed: int, settings: SamplingConfig) -> None:
    """Whether ``draw_samples`` with these can write into ``folder``, which is made where there is none. Cheap.

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


def collect(folder: Path, num: int, path: Path | None = None, *, labelled: bool = True) -> Samples:
    """The samples of ids 0 .. num - 1 in ``folder``, also written to an ``.npz`` (default: ``samples.npz`` there).
    Their images are mapped into memory, not read: the file behind them has no name any more, and goes with them.

    Raises:
        ValueError: ids missing or doubled.
    """
    files = sorted(folder.glob("ids_*.npz"))
    found = np.concatenate([np.zeros(0, np.int64), *(_read_part(file)["ids"] for file in files)])
    _check_ids(folder, np.sort(found[found < num]), num)
    images, scratch = None, folder / "images.npy.tmp"
    labels, drawn, seconds = np.zeros(num, np.int64), np.zeros(num), 0.0
    for file in files:
        part = _read_part(file, images=True)
        keep = part["ids"] < num
        if images is None:
            images = np.lib.format.open_memmap(scratch, "w+", np.uint8, shape=(num, *part["images"].shape[1:]))
        for whole, key in ((images, "images"), (labels, "labels"), (drawn, "drawn")):
            whole[part["ids"][keep]] = part[key][keep]
        seconds += float(part["seconds"]) * float(keep.mean())
    mapped = torch.from_numpy(images).permute(0, 3, 1, 2)
    samples = Samples(mapped, torch.from_numpy(labels) if labelled else None, seconds, float(drawn.mean()))
    write_samples(path or folder / "samples.npz", samples)
    scratch.unlink()
    return samples


def _check_ids(folder: Path, ids: np.ndarray, num: int) -> None:
    """ValueError unless the sorted ``ids`` are 0 .. num - 1."""
    if len(doubled := ids[1:][ids[1:] == ids[:-1]]):
        raise ValueError(f"{folder}: image {doubled[0]} is there twice; delete one of the files")
    missing = np.setdiff1d(np.arange(num), ids)
    if len(missing):
        raise ValueError(f"{folder}: {len(missing)} of {num} images are missing, the first is {missing[0]}")


def _read_part(path: Path, *, images: bool = False) -> dict[str, np.ndarray]:
    """A file of ``draw_samples``; ValueError if it is damaged."""
    part = read_npz(path, (*_KEYS, "images") if images else _KEYS)
    if missing := set(_KEYS) - part.keys():
        raise ValueError(f"{path}: no {', '.join(sorted(missing))} in it; delete the file, its images are made again")
    if not len(part.get("images", part["ids"])) == len(part["labels"]) == part["ids"].size > 0:
        raise ValueError(f"{path}: damaged; delete the file, its images are made again")
    return part
