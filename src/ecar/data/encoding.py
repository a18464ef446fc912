"""Encode a data set to the shards of a cache folder; killed anywhere, the same call goes on behind the last shard."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import Side, differences
from ecar.data.ahead import in_order
from ecar.data.feed import Feed, Sample
from ecar.data.shards import CACHE, PROGRESS, damaged_shards
from ecar.data.source import BadImages
from ecar.devices import images_at_once
from ecar.files.images import CROP, BadImageError, decode_image, fit, to_signed
from ecar.files.records import write_atomically
from ecar.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """What decides the bytes of a cache, next to data and tokenizer.

    Attributes:
        side: (height, width) of the images in pixels.
        flip: also every image mirrored.
        moments: keep the variance where the tokenizer gives one; else only the mean.
        shard_size: images per shard.
        batch_size: images that are encoded at a time, of large ones fewer (``images_at_once``): the last bit of a
            latent may depend on it.
    """

    side: Side
    flip: bool = False
    moments: bool = True
    shard_size: int = 2048
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.batch_size < 1:
            raise ValueError(f"shard and batch sizes must be at least 1, got {self.shard_size} and {self.batch_size}")


@dataclass(kw_only=True)
class Progress:
    """``progress.json``: what is done.

    Attributes:
        plan: what must not change when encoding goes on.
        command: how to go on, for messages.
        shards: per shard: file, images, rows [first, end), bytes, sha256, and sums per channel for the statistics.
        skipped: bad images before the end of the last shard.
        label_values: different labels in order of appearance, where the data do not name their classes.
        unlabelled: an image without a label was met; then none may have one.
    """

    plan: dict[str, Any]
    command: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    label_values: list[int | str] = field(default_factory=list)
    unlabelled: bool = False

    @property
    def row(self) -> int:
        """The first row that is not encoded yet."""
        return int(self.shards[-1]["rows"][1]) if self.shards else 0


def encode_shards(
    feed: Feed,
    tokenizer: Tokenizer,
    out: Path,
    plan: EncodePlan,
    *,
    bad: BadImages,
    command: str = "ecar encode",
    device: str = "cpu",
) -> dict[str, Any]:
    """Write, or complete, the cache folder ``out``; returns its record. Statistics that were not measured yet are
    measured over all images, and the tokenizer of the cache has them.

    Raises:
        ValueError: ``out`` holds a cache of other data, tokenizer or options; bad data; latents that are not finite.
    """
    tokenizer.latent_side(*plan.side)
    progress = _resume(out, _plan_record(feed, tokenizer, plan), command)
    if progress is None:
        return dict(json.loads((out / CACHE).read_text()))
    tokenizer.to(device)
    good = _good_images(feed, progress, plan.side, bad)
    images = sum(shard["images"] for shard in progress.shards)
    with tqdm(total=len(feed) or None, initial=images, desc="encoding", disable=None) as bar:
        while True:
            shard = _encode_shard(islice(good, plan.shard_size), feed, tokenizer, plan, progress, device, bar)
            if shard is None:
                break
            _write_shard(out, progress, *shard)
    tokenizer.to("cpu")
    for line in progress.skipped:
        print(f"skipped {line}", file=sys.stderr)
    if not progress.shards:
        raise ValueError(f"{feed.name}: no usable image; {'; '.join(progress.skipped[:5])}")
    return _finish(out, progress, tokenizer, feed)


def _plan_record(feed: Feed, tokenizer: Tokenizer, plan: EncodePlan) -> dict[str, Any]:
    return {
        "source": feed.state(),
        "rows": len(feed),
        "encoder": tokenizer.fingerprint(),
        "image_side": list(plan.side),
        "crop": CROP,
        "flip": plan.flip,
        "moments": plan.moments and tokenizer.has_moments,
        "shard_size": plan.shard_size,
        "batch_size": plan.batch_size,
    }


def _resume(out: Path, plan: dict[str, Any], command: str) -> Progress | None:
    """Where to go on; None where the cache is complete. ValueError: it is another one."""
    found = next((path for name in (CACHE, PROGRESS) if (path := out / name).exists()), None)
    for name in (CACHE, PROGRESS, "shard_*.safetensors"):  # what a kill left; other files of that ending are not ours
        for left in out.glob(f"{name}.*.tmp"):
            left.unlink()
    try:
        record = {"shards": []} if found is None else json.loads(found.read_text())
        if not record["shards"]:  # nothing is lost: a mistyped option or a label that was mended may be another one now
            progress = Progress(plan=plan, command=command)
            _save_progress(out, progress)
            return progress
        before = record["plan"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out}: holds a cache that cannot be continued; choose another --out") from None
    assert found is not None
    if before.get("source") != plan["source"]:
        counts = f" ({before.get('rows')} rows then, {plan['rows']} now)" if plan["rows"] else ""  # a stream: unknown
        raise ValueError(
            f"{out}: the source data changed since this cache was begun{counts}; restore them, or choose another --out"
        )
    if changed := differences(before, plan):
        raise ValueError(
            f"{out}: holds a cache of another tokenizer or other options ({changed}); choose another --out"
        )
    if found.name == CACHE:
        (out / PROGRESS).unlink(missing_ok=True)
        return None
    if damage := damaged_shards(out, record["shards"]):
        raise ValueError(f"{out}: {'; '.join(damage)}; delete the folder and encode again")
    return Progress(**{**record, "command": command})


def _save_progress(out: Path, progress: Progress) -> None:
    write_atomically(out / PROGRESS, json.dumps(vars(progress)).encode())


def _good_images(feed: Feed, progress: Progress, side: Side, bad: BadImages) -> Iterator[tuple[Sample, np.ndarray]]:
    """Samples with their pixels (height, width, 3); the bad ones are noted in ``progress``, in their order."""

    def pixels(sample: Sample) -> np.ndarray:
        return fit(decode_image(sample.data), *side)

    for sample, result in in_order(pixels, feed.samples(progress.row)):
        if isinstance(result, BadImageError):
            progress.skipped.append(f"{feed.where(sample)}: {result}")
            bad.check(feed.name, progress.skipped, sample.row + 1, len(feed) or sample.row + 1)
        else:
            yield sample, result


@torch.no_grad()
def _encode_shard(
    good: Iterator[tuple[Sample, np.ndarray]],
    feed: Feed,
    tokenizer: Tokenizer,
    plan: EncodePlan,
    progress: Progress,
    device: str,
    bar: Any,
) -> tuple[list[Sample], dict[str, Tensor]] | None:
    """The samples of the next shard, without their bytes, and its tensors; None at the end of the data."""
    moments = progress.plan["moments"]
    samples: list[Sample] = []
    labels: list[int] = []
    parts: dict[str, list[Tensor]] = {"latents": [], "logvar": []}
    while batch := list(islice(good, plan.batch_size)):
        pixels = torch.from_numpy(to_signed(np.stack([p for _, p in batch]))).permute(0, 3, 1, 2).to(device)
        tokenizer.check_images(pixels)
        for key, value in _encode(tokenizer, pixels, plan.flip, moments).items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{feed.where(batch[0][0])}, or one of the {len(batch)} from it on: not finite latents"
                )
            parts[key].append(value)
        labels += [_label(feed, sample, progress) for sample, _ in batch]
        samples += [replace(s, data=b"") for s, _ in batch]  # their bytes are not needed any more
        bar.update(len(batch))
    if not samples:
        return None
    tensors = {key: torch.cat(value, dim=1).contiguous() for key, value in parts.items() if value}
    return samples, {**tensors, "labels": torch.tensor(labels, dtype=torch.int64)}


def _encode(tokenizer: Tokenizer, pixels: Tensor, flip: bool, moments: bool) -> dict[str, Tensor]:
    """Latents (F, B, C, h, w) float16 on the scale that the tokenizer has now, and their log-variances."""
    found: dict[str, list[Tensor]] = {"latents": [], "logvar": []}
    for images in (pixels, pixels.flip(-1))[: 2 if flip else 1]:
        parts = [tokenizer.encode_moments(part) for part in images.split(images_at_once(*images.shape[-2:]))]
        mean = torch.cat([part for part, _ in parts])
        variances = [part for _, part in parts if part is not None]
        found["latents"].append(tokenizer.normalize(mean.float()).half().cpu())
        if moments and variances:
            spread = 2 * tokenizer.std.log().view(1, -1, 1, 1)
            found["logvar"].append((torch.cat(variances).float() - spread).half().cpu())
    return {key: torch.stack(value) for key, value in found.items() if value}


def _label(feed: Feed, sample: Sample, progress: Progress) -> int:
    """The class of a sample, or the place of its label among ``progress.label_values``."""
    names, label, values = feed.classes(), sample.label, progress.label_values
    if names == ():
        return 0
    if names is None and label is None and not values:
        progress.unlabelled = True
        return 0
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"{feed.where(sample)}: the label is {label!r}, not a class id or name")
    if names is not None:
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise ValueError(f"{feed.where(sample)}: label {label!r} is none of the {len(names)} classes")
        return label
    if progress.unlabelled:
        raise ValueError(f"{feed.where(sample)}: has a label, but images before it have none")
    if label not in values:
        values.append(label)
    return values.index(label)


def _write_shard(out: Path, progress: Progress, samples: list[Sample], tensors: dict[str, Tensor]) -> None:
    """The shard, then the note that it is there: killed in between, it is written again, with the same bytes."""
    name = f"shard_{len(progress.shards):05d}.safetensors"
    data = save(tensors, metadata={"ids": json.dumps([s.id for s in samples])})
    write_atomically(out / name, data)
    latents = tensors["latents"][0].double().transpose(0, 1).flatten(1)
    record = {
        "file": name,
        "images": len(samples),
        "rows": [progress.row, samples[-1].row + 1],
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "values": latents.shape[1],
        "sum": latents.sum(1).tolist(),
        "squares": latents.square().sum(1).tolist(),
    }
    if "logvar" in tensors:  # a sample spreads by the variance of the means and the mean of the variances
        record["variances"] = tensors["logvar"][0].double().exp().transpose(0, 1).flatten(1).sum(1).tolist()
    progress.shards.append(record)
    _save_progress(out, progress)


def _finish(out: Path, progress: Progress, tokenizer: Tokenizer, feed: Feed) -> dict[str, Any]:
    """Statistics, tokenizer, and ``cache.json`` as the last file."""
    shift, scale = torch.zeros(tokenizer.channels), torch.ones(tokenizer.channels)
    if not tokenizer.measured:
        count = sum(shard["values"] for shard in progress.shards)

        def total(key: str) -> Tensor:
            sums = [torch.tensor(s.get(key, [0.0] * tokenizer.channels), dtype=torch.float64) for s in progress.shards]
            return torch.stack(sums).sum(0) / count

        mean = total("sum")
        variance = total("squares") - mean.square() + total("variances")
        shift, scale = mean.float(), variance.clamp_min(1e-12).sqrt().float().clamp_min(1e-6)
        tokenizer.mean.copy_(tokenizer.mean + tokenizer.std * shift)
        tokenizer.std.copy_(tokenizer.std * scale)
        tokenizer.measured = True
    tokenizer.save(out / "tokenizer")
    record = {
        "library": "ecar",
        "format": 2,
        **{key: progress.plan[key] for key in ("image_side", "crop", "moments", "encoder")},
        "tokenizer": tokenizer.fingerprint(),
        "shift": shift.tolist(),
        "scale": scale.tolist(),
        "images": sum(shard["images"] for shard in progress.shards),
        "class_names": list(feed.classes() or ()),
        "label_values": progress.label_values,
        "skipped": progress.skipped,
        "data": feed.about(),
        "plan": progress.plan,
        "shards": [{k: shard[k] for k in ("file", "images", "rows", "bytes", "sha256")} for shard in progress.shards],
    }
    write_atomically(out / CACHE, (json.dumps(record, indent=1) + "\n").encode())
    (out / PROGRESS).unlink()
    return record
