"""ImageNet at 256x256, from the images to the field's number: latents, model, 50,000 samples, FID and others, card.

    python recipes/imagenet256.py --data IMAGENET --reference VIRTUAL_imagenet256_labeled.npz --dry-run
    python recipes/imagenet256.py --data IMAGENET --reference VIRTUAL_imagenet256_labeled.npz --weights INCEPTION.pth

IMAGENET is a folder of class folders, tars, parquet files, or a Hub id. The reference is ADM's file of statistics; a
data set of real images works too. Each part runs in --processes processes under torchrun. The same command again goes
on where it was stopped, and what is done is not done again. --dry-run prints the commands, and their time, memory and
cost by calculation. docs/imagenet.md explains it.

Sizes, steps and rates are starting points: no model of this size has been trained with them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoencoder_cost import AutoencoderCost, autoencoder_cost
from ecar.config import ModelConfig, SamplingConfig
from ecar.cost.estimate import estimate
from ecar.cost.memory import sampling_memory
from ecar.network.presets import default_steps, get_preset, preset_config
from ecar.tokenizers import Tokenizer, load_tokenizer
from ecar.training.shape import shares

IMAGES, CLASSES = 1_281_167, 1000  # of ImageNet's training set
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
INCEPTION_FLOPS = 11.4e9  # of an image of 299 pixels, as torch-fidelity's network is counted


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="ImageNet: folder, tars, parquet or Hub id; else any labelled images")
    add("--out", type=Path, default=Path("runs/imagenet256"), help="folder of everything that is written")
    add("--reference", required=True, help="ADM's .npz of statistics, or a data set of real images")
    add("--extractor", default="inception", help="inception (FID), efficientnet-lite0 or dinov2")
    add("--weights", help="file of the extractor's weights; default: its own")
    add("--tokenizer", default="stabilityai/sd-vae-ft-ema", help="as ecar encode takes it: photographs, a folder, ...")
    add("--preset", default="xl/2", help="as ecar train takes it: /2 suits factor 8; 256x4x1+6/2 tries the recipe")
    add("--shard-size", type=int, default=2048, help="images that a process encodes at a time")
    add("--processes", type=int, default=8, help="one for each GPU")
    add("--resolution", type=int, default=256)
    add("--stages", type=int, default=3)
    add("--batch-size", type=int, default=1024, help="images of an update, over all processes")
    add("--accumulate", type=int, default=4, help="passes of a process that make an update: less memory, same step")
    add("--epochs", type=float, default=80)
    add("--max-images", type=int, help="use only so many images")
    add("--lr", type=float, default=2e-4)
    add("--num", type=int, default=50_000, help="samples")
    add("--sample-batch", type=int, default=250, help="samples drawn at once by a process")
    add("--steps", type=int, nargs="+", help="solver steps per stage; default 8, then 4")
    add("--guidance", type=float, nargs="+", help="per stage; default 1.5, and 1 in the last")
    add("--seed", type=int, default=0, help="of the samples: choose steps and guidance on other seeds than you report")
    add("--repo-id", default="owner/imagenet256", help="OWNER/NAME that the card names")
    add("--device", default="auto")
    add("--train", default="", metavar="OPTIONS", help="further options of ecar train: --train='--compile'; they win")
    add("--evaluate", default="", metavar="OPTIONS", help="further options of ecar evaluate, in the same way")
    add("--dry-run", action="store_true", help="print commands, time, memory and cost; run nothing")
    add("--images", type=int, default=IMAGES, help="of --dry-run: images of --data")
    add("--classes", type=int, default=CLASSES, help="of --dry-run: classes of --data")
    add("--tflops", type=float, default=400.0, help="of --dry-run: TFLOP/s that a device reaches in practice")
    add("--autoencoder-tflops", type=float, default=50.0, help="of --dry-run: the same for autoencoder and extractor")
    add("--price", type=float, default=0.0, help="of --dry-run: price of a device for an hour")
    found = parser.parse_args(arguments)
    for name in (
        "processes",
        "resolution",
        "stages",
        "batch_size",
        "accumulate",
        "epochs",
        "num",
        "sample_batch",
        "images",
    ):
        if not 0 < getattr(found, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a positive number")
    if not all(0 < rate < math.inf for rate in (found.tflops, found.autoencoder_tflops)) or found.price < 0:
        parser.error("--tflops and --autoencoder-tflops must be positive numbers, --price at least 0")
    if found.batch_size % (found.processes * found.accumulate):
        parser.error(f"--batch-size {found.batch_size} must divide by --processes times --accumulate")
    get_preset(found.preset)
    found.steps = found.steps or list(default_steps(found.stages))
    found.guidance = found.guidance or [1.5] * (found.stages - 1) + [1.0]
    for name in ("steps", "guidance"):
        if len(getattr(found, name)) != found.stages:
            parser.error(f"--{name} takes one number for each of --stages {found.stages}")
    return found


def parts(args: argparse.Namespace, images: int) -> dict[str, list[str]]:
    """The words of every ``ecar`` command, in order.

    Args:
        images: number of training images.
    """
    out, device = args.out, ["--device", args.device]
    steps = max(1, round(images * args.epochs / args.batch_size))
    few = ["--max-images", str(args.max_images)] if args.max_images else []
    weights = ["--weights", args.weights] if args.weights else []
    return {
        "encode": [
            "encode", "--data", args.data, "--tokenizer", args.tokenizer, "--resolution", str(args.resolution),
            "--flip", "--shard-size", str(args.shard_size), "--out", str(out / "latents"), *few, *device,
        ],
        "train": [
            "train", "--data", str(out / "latents"), "--flip", "--resolution", str(args.resolution),
            "--preset", args.preset, "--stages", str(args.stages), "--lr", str(args.lr),
            "--batch-size", str(args.batch_size), "--max-steps", str(steps), "--ema", "0.999", "0.9999",
            "--accumulate", str(args.accumulate), "--save-every", "2500", "--out", str(out / "model"), *device,
            *shlex.split(args.train),
        ],
        "evaluate": [
            "evaluate", "--model", str(out / "model" / "final"), "--data", args.reference,
            "--extractor", args.extractor, *weights, "--num", str(args.num), "--seed", str(args.seed),
            "--batch-size", str(args.sample_batch), "--steps", *map(str, args.steps),
            "--guidance", *map(str, args.guidance), "--dtype", "bf16", "--out", str(out / "evaluate.json"), *device,
            *shlex.split(args.evaluate),
        ],
        "card": [
            "push", str(out / "model" / "final"), args.repo_id, "--dry-run", "--out", str(out / "card"),
            "--evaluation", str(out / "evaluate.json"),
        ],
    }  # fmt: skip


def launched(words: list[str], processes: int) -> list[str]:
    """A command of ``ecar`` in so many processes of this machine. Behind "--" torchrun reads no options: it would take
    ``--num`` for one of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    alone = processes == 1 or words[0] == "push"
    return [sys.executable, *([] if alone else torchrun), "-m", *([] if alone else ["--"]), "ecar", *words]


def run(args: argparse.Namespace) -> None:
    """All parts, one after the other; each resumes by itself."""
    load_tokenizer(args.tokenizer)  # says what is wrong with it before anything is written
    for name in ("encode", "train", "evaluate", "card"):
        if name == "card" and (args.out / "card" / "README.md").exists():
            print(f"{args.out / 'card'} is there already; delete it for a new one", flush=True)
            continue
        record = args.out / "latents" / "cache.json"
        images = json.loads(record.read_text())["images"] if record.exists() else args.images
        command = launched(parts(args, images)[name], args.processes)
        print(f"{name}: {shlex.join(command)}", flush=True)
        done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ} if args.processes > 1 else None)
        if done.returncode:
            sys.exit(f"{name} ended with code {done.returncode}; the same command goes on")


def known_tokenizer(name: str) -> Tokenizer:
    """The tokenizer, or one of the same shape with random weights where the SD-VAE cannot be had: only its shape
    counts for a plan."""
    try:
        return load_tokenizer(name)
    except ValueError:
        if "sd-vae" not in name:
            raise
    from diffusers import AutoencoderKL

    from ecar.tokenizers.diffusers import DiffusersTokenizer

    return DiffusersTokenizer(AutoencoderKL(**SD_VAE))


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Time, memory, disk and cost of every part, by calculation."""
    tokenizer, side = known_tokenizer(args.tokenizer), (args.resolution, args.resolution)
    images = min(args.images, args.max_images or args.images)
    config = preset_config(
        args.preset, latent=tokenizer.latent_side(*side), stages=args.stages, channels=tokenizer.channels,
        classes=args.classes, image=side,
    )  # fmt: skip
    settings = SamplingConfig(steps=tuple(args.steps), guidance=tuple(args.guidance), solver="ab2")
    share, local = shares((), args.stages), args.batch_size // args.processes // args.accumulate
    cost = autoencoder_cost(tokenizer, side, args.sample_batch)
    model = estimate(config, settings, batch=local, share=share, bf16=True)
    seconds = images * args.epochs * model["training_flops_per_image"] / (1e12 * args.tflops)
    found = {
        "encode": _encode_plan(args, images, cost, tokenizer, config),
        "train": _part(args, seconds, memory=model["training_memory_bytes"]["total"],
                       disk=2 * 16 * model["parameters"]["total"]),  # two checkpoints
        **_sampling_plan(args, model["sampling_flops_per_image"]["total"], cost, config, settings),
    }  # fmt: skip
    total = {key: round(sum(part[key] for part in found.values()), 3) for key in ("hours", "device_hours", "cost")}
    return {
        "preset": args.preset, "parameters": model["parameters"]["total"],
        "sides": [list(s) for s in config.stages.sides], "images": images, "epochs": args.epochs,
        "devices": args.processes, "tflops": args.tflops, "autoencoder_tflops": args.autoencoder_tflops,
        "parts": found, "total": total,
    }  # fmt: skip


def _part(args: argparse.Namespace, device_seconds: float, devices: int = 0, **more: int) -> dict[str, Any]:
    """Hours on ``devices`` (0: all of them), device-hours and their price; of the devices that wait too."""
    hours = device_seconds / (devices or args.processes) / 3600
    paid = hours * args.processes
    named = {f"{name}_gb": round(size / 1e9, 2) for name, size in more.items()}
    return {"hours": round(hours, 4), "device_hours": round(paid, 3), "cost": round(args.price * paid, 2), **named}


def _encode_plan(
    args: argparse.Namespace, images: int, cost: AutoencoderCost, tokenizer: Tokenizer, config: ModelConfig
) -> dict[str, Any]:
    """Every image and its mirror image; latents in float16, with variances where there are some."""
    height, width = config.stages.sides[-1]
    values = 2 * images * tokenizer.channels * height * width * (2 if tokenizer.has_moments else 1)
    seconds = 2 * images * cost.encode_flops / (1e12 * args.autoencoder_tflops)
    return _part(args, seconds, memory=cost.encode_bytes, disk=2 * values)


def _sampling_plan(
    args: argparse.Namespace, flops: int, cost: AutoencoderCost, config: ModelConfig, settings: SamplingConfig
) -> dict[str, dict[str, Any]]:
    """Samples by all devices, then features of samples and of ADM's 10,000 images by one."""
    import torch

    draw = args.num * (flops / (1e12 * args.tflops) + cost.decode_flops / (1e12 * args.autoencoder_tflops))
    memory = sampling_memory(config, settings, (args.sample_batch,), torch.bfloat16)
    most = max(memory[f"batch {args.sample_batch}"]["total"], cost.decode_bytes)
    pixels = 3 * args.resolution**2 * args.num
    judge = (args.num + 10_000) * INCEPTION_FLOPS / (1e12 * args.autoencoder_tflops)
    return {
        "sample": _part(args, draw, memory=most, disk=2 * pixels),
        "metrics": _part(args, judge, devices=1),
    }


def table(record: dict[str, Any]) -> list[str]:
    """Lines for people."""
    columns = ("hours", "device_hours", "cost", "memory_gb", "disk_gb")
    lines = [f"{'':10}" + "".join(f"{name:>15}" for name in columns)]
    for name, part in {**record["parts"], "total": record["total"]}.items():
        lines.append(f"{name:10}" + "".join(f"{part.get(column, ''):>15}" for column in columns))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    args = options(arguments)
    if not args.dry_run:
        run(args)
        return
    record = plan(args)
    for name, words in parts(args, record["images"]).items():
        print(f"{name}: {shlex.join(launched(words, args.processes))}")
    print("\nBy calculation; reading images, starting up and the distances between features are not in it.")
    print("Memory is of one device.")
    print("\n".join(table(record)))
    print(json.dumps(record))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"imagenet256: {error}", file=sys.stderr)
        sys.exit(2)
