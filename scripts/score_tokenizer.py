"""How well a tokenizer keeps images, and what its decoder costs: PSNR of reconstructions, FLOPs and seconds an image.

    python scripts/score_tokenizer.py --tokenizer FOLDER --data photos/ --resolution 256 --num 100 --out score.json

Images at random, always the same ones; PSNR in dB per image, of 8-bit values, then averaged. ``--picture`` shows the
first eight above their reconstructions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from results import write_result

from ecar.cost.flops import flop_counter
from ecar.data.source import ImageReport, iterate_images, load_source
from ecar.files.images import to_signed
from ecar.sampling.pictures import from_decoded, grid
from ecar.tokenizers import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer, source = load_tokenizer(args.tokenizer).eval(), load_source(args.data, max_images=args.num)
    errors, seconds, pairs, flops = [], 0.0, [], 0
    for images, _ in iterate_images(
        source, args.resolution, args.resolution, batch_size=args.batch_size, report=ImageReport()
    ):
        latents = tokenizer.encode(torch.from_numpy(to_signed(images)).permute(0, 3, 1, 2))
        if not flops:
            with flop_counter() as counter:
                tokenizer.decode(latents[:1])
            flops = int(counter.get_total_flops())
        start = time.perf_counter()
        decoded = from_decoded(tokenizer.decode(latents)).permute(0, 2, 3, 1).numpy()
        seconds += time.perf_counter() - start
        errors.append(((decoded.astype(np.float64) - images) ** 2).mean((1, 2, 3)))
        pairs.append(np.stack([images, decoded]))
    psnr = 10 * np.log10(255**2 / np.concatenate(errors))
    if args.picture:
        originals, decodings = np.concatenate(pairs, axis=1)[:, :8]  # each (8, H, W, 3)
        grid([Image.fromarray(image) for image in (*originals, *decodings)], len(originals)).save(args.picture)
    record = {
        "images": len(psnr),
        "resolution": args.resolution,
        "psnr": {"mean": round(float(psnr.mean()), 2), "std over images": round(float(psnr.std()), 2)},
        "latent": {"channels": tokenizer.channels, "factor": tokenizer.factor},
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "decoder_flops_per_image": flops,
        "decoder_seconds_per_image": round(seconds / len(psnr), 4),
        "threads": torch.get_num_threads(),
    }
    write_result(record, args.out)


if __name__ == "__main__":
    main()
