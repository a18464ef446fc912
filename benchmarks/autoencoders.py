"""How well autoencoders keep photographs, how their latents bear pooling, and what their decoders cost.

    python benchmarks/autoencoders.py --tokenizer runs/tokenizer TAESD --data val.parquet --out autoencoders.json

A tokenizer is what ``ecar train --tokenizer`` takes (a folder, a Hub id, ``pixels:4``), or a folder with TAESD's own
files, taesd_encoder.safetensors and taesd_decoder.safetensors. Photographs are a seeded choice, the same for all.

- ``psnr``: dB per image, of 8-bit values, then averaged. ``st_lpips``: shift-tolerant LPIPS on VGG16, lower is better;
  it needs the package stlpips-pytorch, and is null without it.
- ``pooled``: of latents pooled to the side of a coarser stage, the share of variance that is left (mean over channels),
  and the PSNR of what they decode to against the pooled photograph. Stages are drawn from pooled latents, so both
  matter as much as the first.

The last line printed is the record, one JSON object. --picture shows the first eight photographs and what each
tokenizer makes of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import machine, write_result
from ecar.cost.flops import flops_of
from ecar.evaluation.reference import read_images
from ecar.files.tensors import load_weights
from ecar.sampling.pictures import from_decoded, grid
from ecar.stages.resize import down
from ecar.tokenizers import Tokenizer, load_tokenizer
from ecar.tokenizers.diffusers import DiffusersTokenizer
from vgg import Distance, st_lpips

TAESD = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")
_SHOWN = 8


def load(name: str) -> Tokenizer:
    """A tokenizer, or TAESD's own files; ValueError where there is neither."""
    folder = Path(name).expanduser()
    return load_taesd(folder) if all((folder / file).exists() for file in TAESD) else load_tokenizer(name)


def load_taesd(folder: Path) -> Tokenizer:
    """TAESD from its authors' files: diffusers' class has the same layers, but for the clamp before the decoder's."""
    from diffusers import AutoencoderTiny

    autoencoder = AutoencoderTiny(latent_channels=4)
    decoder = torch.nn.Sequential(torch.nn.Identity(), *autoencoder.decoder.layers)
    for part, file in zip((autoencoder.encoder.layers, decoder), TAESD, strict=True):
        load_weights(part, folder / file)
    return DiffusersTokenizer(autoencoder)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """dB (B,) between images (B, 3, H, W) of values from 0 to 255."""
    errors = (images.double() - others.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / errors)


class Moments:
    """Variance of each channel over all that was seen."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, maps: Tensor) -> None:
        """Maps (B, C, h, w)."""
        rows = maps.double().transpose(0, 1).flatten(1)
        self.count += rows.shape[1]
        self.sum = self.sum + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)

    def variance(self) -> Tensor:
        """(C,)."""
        return self.squares / self.count - (self.sum / self.count).square()


@torch.no_grad()
def score(
    tokenizer: Tokenizer, photographs: Tensor, batch: int, levels: int, distance: Distance | None
) -> tuple[dict[str, Any], Tensor]:
    """The record of one tokenizer, and what it makes of the first photographs.

    Args:
        photographs: (N, 3, H, W) uint8.
        batch: images at once.
        levels: how often latents are halved; fewer where their side becomes odd.
        distance: of images in [-1, 1], beside PSNR.
    """
    quality, distances, shown, seconds = list[Tensor](), list[Tensor](), list[Tensor](), 0.0
    moments = [Moments() for _ in range(levels + 1)]
    pooled: list[list[Tensor]] = [[] for _ in range(levels)]
    for images in photographs.split(batch):
        latents = tokenizer.encode(images.float() / 127.5 - 1)
        start = time.perf_counter()
        decoded = tokenizer.decode(latents)
        seconds += time.perf_counter() - start
        moments[0].add(latents)
        quality.append(psnr(images, from_decoded(decoded)))
        if len(shown) * batch < _SHOWN:
            shown.append(from_decoded(decoded))
        if distance is not None:
            distances.append(distance(images.float() / 127.5 - 1, decoded))
        smaller = images.float()
        for level in range(levels):
            latents, smaller = down(latents), down(smaller)
            moments[level + 1].add(latents)
            pooled[level].append(psnr(smaller, from_decoded(tokenizer.decode(latents))))
    whole = moments[0].variance()
    values = torch.cat(quality)
    record = {
        "latent": {"channels": tokenizer.channels, "factor": tokenizer.factor},
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "psnr": round(float(values.mean()), 2),
        "psnr_std_over_images": round(float(values.std()), 2),
        "st_lpips": round(float(torch.cat(distances).mean()), 4) if distances else None,
        "pooled": [
            {
                "side": photographs.shape[-1] >> level + 1,
                "variance_kept": round(float((moments[level + 1].variance() / whole).mean()), 3),
                "psnr": round(float(torch.cat(pooled[level]).mean()), 2),
            }
            for level in range(levels)
        ],
        "decoder_gflop": round(decoder_flops(tokenizer, photographs) / 1e9, 2),
        "decoder_seconds": round(seconds / len(photographs), 4),
    }
    return record, torch.cat(shown)[:_SHOWN]


def decoder_flops(tokenizer: Tokenizer, photographs: Tensor) -> int:
    """Of one image, counted as it runs."""
    side = tokenizer.latent_side(*photographs.shape[-2:])
    return flops_of(lambda: tokenizer.decode(torch.zeros(1, tokenizer.channels, *side)))


def save_picture(rows: list[Tensor], path: Path) -> None:
    """Rows of images (8, 3, H, W) uint8, one above the other."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for row in rows for image in row]
    grid(images, len(rows[0])).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", nargs="+", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="photographs that none was trained on")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--num", type=int, default=100, help="photographs of each data set")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--levels", type=int, default=2, help="how often latents are pooled")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        tokenizers = {name: load(name).eval() for name in args.tokenizer}
        for tokenizer in tokenizers.values():
            tokenizer.latent_side(args.resolution, args.resolution)
        photographs = {data: read_images(data, "test", args.resolution, args.resolution, args.num).images
                       for data in args.data}  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    distance, rows, scores = st_lpips(), list[Tensor](), dict[str, dict[str, Any]]()
    for data, images in photographs.items():
        rows.append(images[:_SHOWN])
        scores[data] = {"images": len(images)}
        for name, tokenizer in tokenizers.items():
            scores[data][name], decoded = score(tokenizer, images, args.batch_size, args.levels, distance)
            rows.append(decoded)
            print(data, name, scores[data][name], flush=True)
    if args.picture:
        save_picture(rows, args.picture)
    write_result({"resolution": args.resolution, "machine": machine(), "scores": scores}, args.out)


if __name__ == "__main__":
    main()
