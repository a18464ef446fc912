"""Encode a data set to the shards of a cache folder; killed anywhere, the same call writes those that are missing."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import Side, differences
from ecar.data.ahead import in_order
from ecar.data.shards import CACHE, PROGRESS, damaged_shards, note_file, shard_file, shard_notes
from ecar.data.source import BadImages, ImageSource
from ecar.devices import images_at_once
from ecar.files.images import CROP, BadImageError, decode_image, fit, to_signed
from ecar.files.records import write_atomically
from ecar.processes.watchdog import FORWARD, READ, WAIT, Watchdog
from ecar.processes.world import World
from ecar.tokenizers import Tokenizer

_ALONE = World()


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """What decides the bytes of a cache, next to data and tokenizer.

    Attributes:
        side: (height, width) of the images in pixels.
        flip: also every image mirrored.
        moments: keep the variance where the tokenizer gives one; else only the mean.
        shard_size: rows of the data per shard.
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
class Found:
    """What encoding meets on its way.

    Attributes:
        skipped: bad images of the shard that is encoded.
        before: how many there were in other shards.
        images: how many are encoded, of all shards of this process.
    """

    skipped: list[str] = field(default_factory=list)
    before: int = 0
    images: int = 0


def encode_shards(
    source: ImageSource,
    tokenizer: Tokenizer,
    out: Path,
    plan: EncodePlan,
    *,
    bad: BadImages,
    command: str = "ecar encode",
    device: str = "cpu",
    world: World = _ALONE,
) -> dict[str, Any]:
    """Write, or complete, the cache folder ``out``; returns its record. Statistics that were not measured yet are
    measured over all images, and the tokenizer of the cache has them.

    Shard k holds rows k ``shard_size`` to (k + 1) ``shard_size`` without bad images, so that its bytes depend neither
    on other shards nor on who encodes it: each process of ``world`` takes some, and its first one puts the cache
    together.

    Raises:
        ValueError: ``out`` holds a cache of other data, tokenizer or options; bad data; latents that are not finite.
    """
    tokenizer.latent_side(*plan.side)
    record = _plan_record(source, tokenizer, plan)
    done = world.from_first(lambda: _resume(out, record, command))
    if done is not None:
        with Watchdog(world) as watchdog:
            _encode_missing(source, tokenizer.to(device), out, plan, done, bad, world, watchdog)
            watchdog.at(sys.maxsize, WAIT)
            world.meet("shards")
        tokenizer.to("cpu")
        world.from_first(lambda: _finish(out, record, tokenizer, source, bad if world.size > 1 else None))
    return dict(json.loads((out / CACHE).read_text()))


def _plan_record(source: ImageSource, tokenizer: Tokenizer, plan: EncodePlan) -> dict[str, Any]:
    return {
        "source": source.state(),
        "rows": len(source),
        "encoder": tokenizer.fingerprint(),
        "image_side": list(plan.side),
        "crop": CROP,
        "flip": plan.flip,
        "moments": plan.moments and tokenizer.has_moments,
        "shard_size": plan.shard_size,
        "batch_size": plan.batch_size,
    }


def _resume(out: Path, plan: dict[str, Any], command: str) -> list[int] | None:
    """Numbers of the shards that are there; None where the cache is complete. ValueError: it is another one."""
    found = next((path for name in (CACHE, PROGRESS) if (path := out / name).exists()), None)
    for name in (CACHE, PROGRESS, "shard_*.safetensors", "shard_*.json"):  # what a kill left; others are not ours
        for left in out.glob(f"{name}.*.tmp"):
            left.unlink()
    notes = shard_notes(out)
    try:
        record = {} if found is None else json.loads(found.read_text())
        if not record.get("shards", notes):
            # Nothing is lost: a mistyped option or a label that was mended may be another one now.
            write_atomically(out / PROGRESS, json.dumps({"plan": plan, "command": command}).encode())
            return []
        before = record["plan"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{out}: holds a cache that cannot be continued; choose another --out") from None
    assert found is not None
    if before.get("source") != plan["source"]:
        raise ValueError(
            f"{out}: the source data changed since this cache was begun ({before.get('rows')} rows then, "
            f"{plan['rows']} now); restore them, or choose another --out"
        )
    if changed := differences(before, plan):
        raise ValueError(
            f"{out}: holds a cache of another tokenizer or other options ({changed}); choose another --out"
        )
    if found.name == CACHE:
        _remove_notes(out)
        return None
    if damage := damaged_shards(out, [note for note in notes.values() if note["images"]]):
        raise ValueError(f"{out}: {'; '.join(damage)}; delete the folder and encode again")
    write_atomically(out / PROGRESS, json.dumps({"plan": plan, "command": command}).encode())
    return sorted(notes)


def _remove_notes(out: Path) -> None:
    """What only an unfinished cache needs."""
    for number in shard_notes(out):
        note_file(out, number).unlink()
    (out / PROGRESS).unlink(missing_ok=True)


def _encode_missing(
    source: ImageSource, tokenizer: Tokenizer, out: Path, plan: EncodePlan, done: list[int], bad: BadImages,
    world: World, watchdog: Watchdog,
) -> None:  # fmt: skip
    """Write those shards that are not there, this process's share of them."""
    size, rows = plan.shard_size, len(source)
    found = Found(before=sum(len(note["skipped"]) for note in shard_notes(out).values()))
    numbers = world.share(sorted(set(range(-(-rows // size))) - set(done)))
    parts = {number: [number * size, min(rows, (number + 1) * size)] for number in numbers}
    total = sum(end - start for start, end in parts.values())
    work = in_order(lambda encoded: fit(decode_image(encoded[1]), *plan.side), _encoded(source, numbers, size))
    with tqdm(total=total, desc="encoding", disable=True if world.rank else None) as bar:
        for number, pairs in groupby(work, key=lambda pair: pair[0][0] // size):
            good = _good_images(source, found, pairs, bad)
            tensors = _encode_shard(good, source, tokenizer, plan, found, bar, watchdog)
            _write_shard(out, number, found, parts[number], tensors)


def _encoded(source: ImageSource, numbers: Sequence[int], size: int) -> Iterator[tuple[int, bytes | BadImageError]]:
    """The rows of some shards; of neighbours without asking the source anew."""
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        together = [number for _, number in run]
        yield from islice(source.encoded(together[0] * size), len(together) * size)


def _good_images(
    source: ImageSource, found: Found, pairs: Iterable[tuple[tuple[int, Any], np.ndarray | BadImageError]],
    bad: BadImages,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Rows of a shard with their pixels (height, width, 3); bad ones are noted."""
    for (row, _), result in pairs:
        if isinstance(result, BadImageError):
            found.skipped.append(f"{source.path(row)}: {result}")
            skipped = [""] * found.before + found.skipped
            bad.check(source.name, skipped, row + 1, len(source))
        else:
            yield row, result


@torch.no_grad()
def _encode_shard(
    good: Iterator[tuple[int, np.ndarray]], source: ImageSource, tokenizer: Tokenizer, plan: EncodePlan, found: Found,
    bar: Any, watchdog: Watchdog,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a shard."""
    rows: list[int] = []
    parts: dict[str, list[Tensor]] = {"latents": [], "logvar": []}
    while batch := list(islice(good, plan.batch_size)):
        watchdog.at(found.images, FORWARD)
        pixels = torch.from_numpy(to_signed(np.stack([p for _, p in batch]))).permute(0, 3, 1, 2)
        pixels = pixels.to(tokenizer.mean.device)
        tokenizer.check_images(pixels)
        for key, value in _encode(tokenizer, pixels, plan.flip, plan.moments and tokenizer.has_moments).items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{source.path(batch[0][0])}, or one of the {len(batch)} from it on: not finite latents"
                )
            parts[key].append(value)
        rows += [row for row, _ in batch]
        bar.update(len(batch))
        found.images += len(batch)
        watchdog.at(found.images, READ)
    tensors = {key: torch.cat(value, dim=1).contiguous() for key, value in parts.items() if value}
    return {**tensors, "labels": torch.from_numpy(source.labels[rows])}


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


def _write_shard(out: Path, number: int, found: Found, rows: list[int], tensors: dict[str, Tensor]) -> None:
    """The shard, then the note that it is there: killed in between, it is written again, with the same bytes. Of bad
    images alone there is only the note."""
    note: dict[str, Any] = {"file": shard_file(number), "images": len(tensors["labels"]), "rows": rows}
    if note["images"]:
        data = save(tensors)
        write_atomically(out / note["file"], data)
        latents = tensors["latents"][0].double().transpose(0, 1).flatten(1)
        note |= {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "values": latents.shape[1],
            "sum": latents.sum(1).tolist(),
            "squares": latents.square().sum(1).tolist(),
        }
    if "logvar" in tensors:  # a sample spreads by the variance of the means and the mean of the variances
        note["variances"] = tensors["logvar"][0].double().exp().transpose(0, 1).flatten(1).sum(1).tolist()
    note["skipped"] = found.skipped
    write_atomically(note_file(out, number), json.dumps(note).encode())
    found.before, found.skipped = found.before + len(found.skipped), []


def _finish(out: Path, plan: dict[str, Any], tokenizer: Tokenizer, source: ImageSource, bad: BadImages | None) -> None:
    """Statistics, tokenizer, and ``cache.json`` as the last file. ``bad`` is asked of what all processes skipped."""
    notes = list(shard_notes(out).values())
    skipped, shards = [line for note in notes for line in note["skipped"]], [note for note in notes if note["images"]]
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    if not shards:
        raise ValueError(f"{source.name}: no usable image; {'; '.join(skipped[:5])}")
    if bad is not None:
        replace(bad, stop=False).check(source.name, skipped, len(source), len(source))
    shift, scale = torch.zeros(tokenizer.channels), torch.ones(tokenizer.channels)
    if not tokenizer.measured:
        shift, scale = _statistics(shards, tokenizer.channels)
        tokenizer.mean.copy_(tokenizer.mean + tokenizer.std * shift)
        tokenizer.std.copy_(tokenizer.std * scale)
        tokenizer.measured = True
    tokenizer.save(out / "tokenizer")
    record = {
        "library": "ecar",
        "format": 2,
        **{key: plan[key] for key in ("image_side", "crop", "moments", "encoder")},
        "tokenizer": tokenizer.fingerprint(),
        "shift": shift.tolist(),
        "scale": scale.tolist(),
        "images": sum(shard["images"] for shard in shards),
        "class_names": list(source.class_names),
        "skipped": skipped,
        "data": source.about(),
        "plan": plan,
        "shards": [{k: shard[k] for k in ("file", "images", "rows", "bytes", "sha256")} for shard in shards],
    }
    write_atomically(out / CACHE, (json.dumps(record, indent=1) + "\n").encode())
    _remove_notes(out)


def _statistics(shards: list[dict[str, Any]], channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel over the images of all shards, each (C,) float32."""
    count = sum(shard["values"] for shard in shards)

    def total(key: str) -> Tensor:
        sums = [torch.tensor(shard.get(key, [0.0] * channels), dtype=torch.float64) for shard in shards]
        return torch.stack(sums).sum(0) / count

    mean = total("sum")
    variance = total("squares") - mean.square() + total("variances")
    return mean.float(), variance.clamp_min(1e-12).sqrt().float().clamp_min(1e-6)
