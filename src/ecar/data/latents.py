"""Latent tables: a data set encoded once, in memory or in a cache folder (``ecar encode``)."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import Side
from ecar.data.images import to_signed
from ecar.data.source import ImageReport, ImageSource, iterate_images
from ecar.tokenizers import Tokenizer, load_tokenizer

_BATCH = 250
_MEASURE_BATCHES = 40


@dataclass(frozen=True, kw_only=True)
class LatentTable:
    """Unit-scale latents of a data set.

    Attributes:
        latents: (F, N, C, h, w) float16; F = 2 when the second half are the mirrored images, else 1.
        labels: (N,) int64.
        class_names: one name per class; empty for unlabelled data.
        image_side: (height, width) of the images.
        tokenizer: fingerprint of the tokenizer that made them.
        skipped: bad images left out.
    """

    latents: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    image_side: Side
    tokenizer: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.latents.shape[1]


@torch.no_grad()
def encode_source(
    source: ImageSource, tokenizer: Tokenizer, side: Side, *, flip: bool, device: str = "cpu"
) -> LatentTable:
    """Encode every image of ``source``. Statistics that were not measured yet (pixels, a diffusers
    autoencoder as published) are measured on the way, in place.

    Raises:
        ValueError: sides that do not divide, or bad data.
    """
    tokenizer.latent_side(*side)
    tokenizer.to(device)
    report = ImageReport()
    raw: list[Tensor] = []
    mirrored: list[Tensor] = []
    labels: list[Tensor] = []
    batches = iterate_images(source, *side, batch_size=_BATCH, report=report)
    total = -(-len(source) // _BATCH)
    for images, batch_labels in tqdm(batches, total=total, desc="encoding", disable=None):
        pixels = torch.from_numpy(to_signed(images)).permute(0, 3, 1, 2).to(device)
        raw.append(tokenizer.encode_raw(pixels).float().cpu())
        if flip:
            mirrored.append(tokenizer.encode_raw(pixels.flip(-1)).float().cpu())
        labels.append(torch.from_numpy(batch_labels))
    for line in report.skipped or []:
        print(f"skipped {line}", file=sys.stderr)
    if not tokenizer.measured:
        tokenizer.measure(raw[:: max(1, len(raw) // _MEASURE_BATCHES)])
    tokenizer.to("cpu")
    sets = [torch.cat([tokenizer.normalize(r).half() for r in part]) for part in (raw, mirrored) if part]
    return LatentTable(
        latents=torch.stack(sets),
        labels=torch.cat(labels),
        class_names=source.class_names,
        image_side=side,
        tokenizer=tokenizer.fingerprint(),
        skipped=tuple(report.skipped or ()),
    )


def save_latents(table: LatentTable, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a cache folder: ``latents.safetensors``, ``cache.json`` and the tokenizer itself."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    temporary = folder / "latents.safetensors.tmp"
    save_file({"latents": table.latents.contiguous(), "labels": table.labels}, temporary)
    temporary.rename(folder / "latents.safetensors")
    record = {
        "library": "ecar",
        "images": len(table),
        "class_names": list(table.class_names),
        "image_side": list(table.image_side),
        "tokenizer": table.tokenizer,
        "skipped": list(table.skipped),
    }
    (folder / "cache.json").write_text(json.dumps(record, indent=1) + "\n")


def is_cache(path: str) -> bool:
    """Whether ``path`` is a folder that ``save_latents`` wrote."""
    return (Path(path).expanduser() / "cache.json").exists()


def load_latents(path: str) -> tuple[LatentTable, Tokenizer]:
    """Read a cache folder; ValueError if it is damaged or its tokenizer is not the one that made the latents."""
    folder = Path(path).expanduser()
    try:
        record = json.loads((folder / "cache.json").read_text())
        tensors = load_file(folder / "latents.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged latent cache ({error}); run ecar encode again") from None
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint() != record["tokenizer"]:
        raise ValueError(
            f"{folder}: latents of tokenizer {record['tokenizer']}, but the folder holds {tokenizer.fingerprint()}; "
            "run ecar encode again"
        )
    if tensors["latents"].shape[1] != record["images"] or len(tensors["labels"]) != record["images"]:
        raise ValueError(f"{folder}: cache.json names {record['images']} images, the file holds another number")
    table = LatentTable(
        latents=tensors["latents"],
        labels=tensors["labels"],
        class_names=tuple(record["class_names"]),
        image_side=(record["image_side"][0], record["image_side"][1]),
        tokenizer=record["tokenizer"],
        skipped=tuple(record["skipped"]),
    )
    return table, tokenizer
