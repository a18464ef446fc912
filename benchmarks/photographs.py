"""Photographs end to end at 256x256: parquet -> autoencoder -> `ecar encode` -> `ecar train` -> `ecar sample`.

    python benchmarks/photographs.py --data train.parquet --folder runs/photos --out results/photographs/path.json

The autoencoder is a small diffusers AutoencoderKL (factor 8, 4 channels) with random weights: this shows that the path
works and what it costs, not pictures worth looking at. ``--tokenizer`` takes a trained one, a folder or a Hub id.
"""

import argparse
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common import machine, write_result
from ecar.cli.encode import run as encode
from ecar.cli.sample import run as sample
from ecar.cli.train import run as train


def random_autoencoder(folder: Path) -> Path:
    """AutoencoderKL, factor 8, 4 channels, random weights, as diffusers saves it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = 4
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def timed(name: str, verb: Callable[[Sequence[str]], None], words: list[str]) -> dict[str, Any]:
    """Run a verb of the command line in this process: its command and its seconds."""
    print("$", command := shlex.join(["ecar", name, *words]), flush=True)
    start = time.perf_counter()
    verb(words)
    return {"command": command, "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photographs with labels: parquet, folder, tars")
    parser.add_argument("--folder", type=Path, required=True, help="where autoencoder, latents and run go")
    parser.add_argument("--out", type=Path, required=True, help="record to write (.json)")
    parser.add_argument("--tokenizer", help="a trained autoencoder instead of the random one")
    parser.add_argument("--images", type=int, help="use only so many")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    tokenizer = options.tokenizer or str(random_autoencoder(options.folder / "autoencoder"))
    latents, run, picture = (str(options.folder / name) for name in ("latents", "run", "samples.png"))
    side = ["--resolution", "256", "--flip", "--device", "cpu"]
    limit = ["--max-images", str(options.images)] if options.images else []
    words = ["--data", options.data, "--tokenizer", tokenizer, *side, "--batch-size", "8", *limit, "--out", latents]
    encoded = timed("encode", encode, words)
    cache = json.loads(Path(latents, "cache.json").read_text())
    words = ["--data", latents, *side, "--preset", "nano", "--stages", "3", "--max-steps", str(options.steps)]
    words += ["--batch-size", str(options.batch_size)]
    trained = timed("train", train, [*words, "--out", run])
    records = map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    words = [f"{run}/final", "--classes", "0,1", "--per-class", "2", "--steps", "4", "--out", picture]
    sampled = timed("sample", sample, [*words, "--device", "cpu"])
    with Image.open(picture) as image:
        size = list(image.size)
    record = {
        "images": cache["images"],
        "machine": machine(),
        "encode": {**encoded, "images_per_second": round(2 * cache["images"] / encoded["seconds"], 2)},  # both flips
        "train": {**trained, "loss_first": losses[0], "loss_last": losses[-1]},
        "sample": {**sampled, "grid": size},
    }
    write_result(record, options.out)


if __name__ == "__main__":
    main()
