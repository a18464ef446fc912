"""``ecar encode``: a data set to latents, once."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ecar.cli.flags import together
from ecar.cli.options import parse
from ecar.config import image_side
from ecar.data.reading import ReadOptions

if TYPE_CHECKING:
    from ecar.processes.world import World


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(ReadOptions):
    """Encode a data set to latents; `ecar train --data CACHE` reads them."""

    data: str
    """Folder of images, WebDataset tars, parquet file or folder, or Hub data set id."""
    tokenizer: str
    """pixels, pixels:FACTOR, photographs (bundled), a bundled model, a folder of `ecar tokenizer`, or a diffusers
    autoencoder (folder or Hub id)."""
    out: str
    """Cache folder to write. The same command again goes on where it was stopped."""
    resolution: tuple[int, ...] = (32,)
    """Side of the images in pixels, or height and width."""
    flip: bool = False
    """Also encode every image mirrored."""
    posterior: Literal["sample", "mode"] = "sample"
    """What to keep of a tokenizer's distribution (AutoencoderKL, AutoencoderKLFlux2). sample: mean and variance, and
    every training step draws its own sample. mode: the mean only, half the size."""
    shard_size: int = 2048
    """Images per shard: what one process of several does at a time."""
    batch_size: int = 32
    """Images encoded at a time."""
    max_images: int | None = None
    """Use only so many images, a random choice."""
    bad_images: Literal["skip", "stop"] = "skip"
    """skip (and list) images that cannot be read, or stop at the first."""
    max_bad_share: float = 0.1
    """Stop when more than this share is bad; up to five are let pass unless it is 0."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""


OPTIONS = EncodeOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, encode or go on encoding, print a summary as JSON; under torchrun each process takes some shards."""
    options = parse(EncodeOptions, arguments, "encode")
    with together(options.device, "while encoding, finished shards stay") as (world, device):
        command, start = shlex.join(["ecar", "encode", *arguments]), time.perf_counter()
        summary = _encode(options, command, device, world)
        if world.rank == 0:
            print(json.dumps({**summary, "seconds": round(time.perf_counter() - start, 2)}))
        world.meet("end")


def _encode(options: EncodeOptions, command: str, device: str, world: World) -> dict[str, Any]:
    from ecar.data.encoding import EncodePlan, encode_shards
    from ecar.data.source import BadImages, load_source
    from ecar.files.lock import run_lock
    from ecar.files.records import make_out
    from ecar.tokenizers import load_tokenizer

    plan = EncodePlan(
        side=image_side(options.resolution),
        flip=options.flip,
        moments=options.posterior == "sample",
        shard_size=options.shard_size,
        batch_size=options.batch_size,
    )
    bad = BadImages(stop=options.bad_images == "stop", max_share=options.max_bad_share)
    out = make_out(options.out, options.data, pictures=False)
    tokenizer = world.first_then_others(lambda: load_tokenizer(options.tokenizer))
    tokenizer.latent_side(*plan.side)
    source = world.first_then_others(
        lambda: load_source(options.data, options.reading(), max_images=options.max_images)
    )
    with ExitStack() as lock:
        if world.rank == 0:
            lock.enter_context(run_lock(out))
        record = encode_shards(source, tokenizer, out, plan, bad=bad, command=command, device=device, world=world)
    return {
        "cache": str(out),
        "images": record["images"],
        "skipped": len(record["skipped"]),
        "tokenizer": record["tokenizer"],
        "latent": [tokenizer.channels, *tokenizer.latent_side(*plan.side)],
        "classes": len(record["class_names"]),
        "shards": len(record["shards"]),
    }
