"""Peak memory of commands that read images, at several sides: what each child process held at most (``ru_maxrss``).

    python benchmarks/memory.py --sides 64 256 512 --out results/memory/record.json

Synthetic photographs, small networks, two steps: what is compared is how memory grows with the pixels. ``--source``
runs another checkout. A command that asks for more than ``--limit`` is ended by the system, and its peak is then null.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOKENIZER = ("--factor", "8", "--channels", "4", "--widths", "16", "16", "16", "16", "--depth", "1")
MODEL = ("--preset", "16x2x1+1", "--stages", "2")
GIB = 2**30


def photographs(folder: Path, count: int, side: int = 256) -> None:
    """Smooth random pictures as PNG files in two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("even", "odd")[number % 2] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, compress_level=1)


def commands(data: Path, work: Path, side: int, images: int) -> dict[str, list[str]]:
    """The verbs with their arguments, each of which may need what those before it wrote."""
    size, tokenizer, run = ("--resolution", str(side)), str(work / "tokenizer"), str(work / "run")
    few = ("--max-steps", "2", "--batch-size", "1", "--device", "cpu")
    judged = ("--num", str(images), "--train-data", str(data), "--steps", "1", "--batch-size", "16", "--allow-small")
    return {
        "tokenizer": [
            "tokenizer", "--data", str(data), *size, *few, *TOKENIZER, "--perceptual", "0", "--out", tokenizer,
        ],
        "encode": ["encode", "--data", str(data), *size, "--tokenizer", tokenizer, "--out", str(work / "latents")],
        "train": [
            "train", "--data", str(data), *size, *few, *MODEL, "--tokenizer", tokenizer, "--out", run,
        ],
        "evaluate": [
            "evaluate", "--model", f"{run}/final", "--data", str(data), *judged, "--device", "cpu",
            "--cache", str(work / "cache"), "--out", str(work / "evaluate.json"),
        ],
    }  # fmt: skip


def peak(arguments: list[str], source: Path | None, limit: float) -> float | None:
    """GiB that ``ecar`` with these arguments held at most; None where it failed, whose last line is then shown."""
    environment = {**os.environ, **({"PYTHONPATH": str(source / "src")} if source else {})}

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GIB), int(limit * GIB)))

    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "ecar", *arguments], env=environment, stdout=said, stderr=said, preexec_fn=restrict
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode == 0:
            return round(usage.ru_maxrss / 2**20, 2)  # Linux counts KiB
        said.seek(0)
        print(f"{arguments[0]}: exit {child.returncode}: {said.read().strip().splitlines()[-1:]}", file=sys.stderr)
        return None


def commit_of(source: Path | None) -> str:
    folder = source or Path(__file__).parent
    return subprocess.run(
        ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256, 512], help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=600, help="photographs; more than 500 show old fixed batches")
    parser.add_argument("--judged", type=int, default=260, help="samples that are drawn and judged")
    parser.add_argument("--verbs", nargs="+", help="only these; later ones may need earlier ones")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB that a command may ask for")
    parser.add_argument("--source", type=Path, help="checkout to run instead of the installed package")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "photographs"
        photographs(data, args.images)
        for side in args.sides:
            for verb, arguments in commands(data, Path(temporary) / str(side), side, args.judged).items():
                if not args.verbs or verb in args.verbs:
                    found.setdefault(verb, {})[str(side)] = peak(arguments, args.source, args.limit)
                    print(f"{verb} {side}: {found[verb][str(side)]} GiB", file=sys.stderr, flush=True)
    record = {
        "commit": commit_of(args.source), "images": args.images, "judged": args.judged, "limit_gib": args.limit,
        "cores": os.cpu_count(), "peak_gib": found,
    }  # fmt: skip
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
