"""``ecar encode``: a data set to latents, once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ecar.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Encode a data set to latents; `ecar train --data CACHE` reads them."""

    data: str
    """Folder of images, parquet file or folder, or Hub data set id."""
    tokenizer: str
    """pixels, pixels:FACTOR, a folder of `ecar tokenizer`, or a diffusers autoencoder (folder or Hub id)."""
    out: str
    """Cache folder to write."""
    resolution: tuple[int, ...] = (32,)
    """Side of the images in pixels, or height and width."""
    flip: bool = False
    """Also encode every image mirrored."""
    split: str = "train"
    """Split of a data set that has several."""
    max_images: int | None = None
    """Use only the first images."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""


def run(arguments: Sequence[str]) -> None:
    """Parse, encode, write, print a summary as JSON."""
    options = parse(EncodeOptions, arguments, "encode")
    if len(options.resolution) not in (1, 2) or min(options.resolution) < 1:
        raise ValueError(f"--resolution takes one side, or height and width; got {options.resolution}")
    from ecar.data.latents import encode_source, save_latents
    from ecar.data.source import load_source
    from ecar.devices import resolve_device
    from ecar.tokenizers import load_tokenizer
    from ecar.training.run import make_out

    out, device = make_out(options.out), resolve_device(options.device)
    tokenizer = load_tokenizer(options.tokenizer)
    side = (options.resolution[0], options.resolution[-1])
    tokenizer.latent_side(*side)
    source = load_source(options.data, split=options.split, max_images=options.max_images)
    table = encode_source(source, tokenizer, side, flip=options.flip, device=device)
    save_latents(table, tokenizer, out)
    summary = {"cache": str(out), "images": len(table), "skipped": len(table.skipped), "tokenizer": table.tokenizer}
    print(json.dumps({**summary, "latent": list(table.latents.shape[2:]), "classes": len(table.class_names)}))
