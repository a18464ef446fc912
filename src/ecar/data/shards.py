"""Cache folders of ``ecar encode``: shards of latents, mapped into memory, and the record of what made them.

cache.json              written last: a folder without it is half written
progress.json           while encoding: the plan
shard_00000.json        while encoding: the note that the shard is there
shard_00000.safetensors latents (F, n, C, h, w) float16, labels (n,), logvar like latents where the tokenizer gives
                        distributions
tokenizer/
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ecar.data.latents import LatentTable
from ecar.files.access import check_readable
from ecar.files.images import CROP
from ecar.tokenizers import Tokenizer, load_tokenizer

CACHE, PROGRESS = "cache.json", "progress.json"
_AGAIN = "run ecar encode again"


def shard_file(number: int) -> str:
    """Name of a shard."""
    return f"shard_{number:05d}.safetensors"


def note_file(folder: Path, number: int) -> Path:
    """While encoding: what says that a shard is there."""
    return folder / f"shard_{number:05d}.json"


def shard_notes(folder: Path) -> dict[int, dict[str, Any]]:
    """The notes of a cache that is half written, by the numbers of their shards, in their order."""
    files = sorted(folder.glob("shard_*.json"))
    return {int(file.stem.removeprefix("shard_")): json.loads(file.read_text()) for file in files}


def is_cache(path: str) -> bool:
    """Whether ``path`` is a folder of ``ecar encode``, complete or not."""
    folder = Path(path).expanduser()
    check_readable(folder / CACHE)
    return (folder / CACHE).exists() or (folder / PROGRESS).exists()


def load_latents(path: str) -> tuple[LatentTable, Tokenizer]:
    """A cache folder.

    Raises:
        ValueError: it is half written, damaged or of another crop, or its tokenizer is not the one that made it.
    """
    folder = Path(path).expanduser()
    check_readable(folder / CACHE)
    check_readable(folder / PROGRESS)
    try:
        if not (folder / CACHE).exists() and (folder / PROGRESS).exists():
            progress = json.loads((folder / PROGRESS).read_text())
            images = sum(note["images"] for note in shard_notes(folder).values())
            raise ValueError(f"half written, {images} images so far; to go on: {progress['command']}")
        record = json.loads((folder / CACHE).read_text())
        tokenizer = load_tokenizer(folder / "tokenizer")
        if tokenizer.fingerprint() != record["tokenizer"]:
            raise ValueError(
                f"latents of tokenizer {record['tokenizer']}, but the folder holds {tokenizer.fingerprint()}; {_AGAIN}"
            )
        if record["crop"] != CROP:
            raise ValueError(f"images were cropped by {record['crop']!r}, this version does {CROP!r}; {_AGAIN}")
        return _open_shards(folder, record), tokenizer
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged latent cache ({error}); {_AGAIN}") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _content(record: dict[str, Any]) -> str:
    """From the hashes of the shards."""
    hashes = [str(shard["sha256"]) for shard in record["shards"]]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def _open_shards(folder: Path, record: dict[str, Any]) -> LatentTable:
    latents, logvar, labels = [], [], []
    for shard in record["shards"]:
        path = folder / shard["file"]
        check_readable(path)
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {shard['bytes']}; {_AGAIN}")
        with safe_open(path, framework="pt") as file:  # get_tensor maps, it does not read
            latents.append(file.get_tensor("latents"))
            labels.append(file.get_tensor("labels"))
            if record["moments"]:
                logvar.append(file.get_tensor("logvar"))
        if latents[-1].shape[1] != shard["images"]:
            raise ValueError(f"{path.name} holds {latents[-1].shape[1]} images, not {shard['images']}; {_AGAIN}")
    return LatentTable(
        latents=tuple(latents),
        logvar=tuple(logvar),
        labels=torch.cat(labels),
        shift=torch.tensor(record["shift"], dtype=torch.float32),
        scale=torch.tensor(record["scale"], dtype=torch.float32),
        class_names=tuple(record["class_names"]),
        image_side=(record["image_side"][0], record["image_side"][1]),
        tokenizer=record["tokenizer"],
        encoder=record["encoder"],
        skipped=tuple(record["skipped"]),
        content=_content(record),
        about=record["data"],
    )


def check_cache(path: str) -> dict[str, Any]:
    """What a cache holds, and under "damaged" which of its files are not what was written, or are missing.

    Raises:
        ValueError: half written, or its own records cannot be read.
    """
    folder = Path(path).expanduser()
    check_readable(folder / CACHE)
    if not (folder / CACHE).exists():
        load_latents(path)  # says how to go on
    try:
        record = json.loads((folder / CACHE).read_text())
        shards = record["shards"]
        found = {"cache": path, "images": record["images"], "shards": len(shards), "skipped": len(record["skipped"])}
        found["data"] = record["data"]
        damaged = damaged_shards(folder, shards)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: damaged latent cache ({error}); {_AGAIN}") from None
    if not damaged:
        load_latents(path)  # all that training would ask
    return {**found, "damaged": damaged}


def damaged_shards(folder: Path, shards: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the files of ``shards``, one line each: missing, or other bytes than were written."""
    found = []
    for shard in shards:
        check_readable(folder / shard["file"])
        try:
            with open(folder / shard["file"], "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    found.append(f"{shard['file']}: hash mismatch")
        except OSError as error:
            found.append(f"{shard['file']}: {error.strerror}")
    return found
