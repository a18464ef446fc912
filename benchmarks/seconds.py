"""Seconds per image of the settings of some curves, all in turns in one process: for a machine with nothing else to do.

    python benchmarks/seconds.py --ecar ecar_curve.jsonl --ecar-model RUN/final --dit dit_curve.jsonl \\
        --dit-model DIT/final --out seconds.json

Curves hold seconds too, but were drawn at different times, beside other work: `compare.py --seconds` takes these.
Time depends on sizes and settings, not on weights, so one model a side does for all seeds and students of its sizes.
Teacher-forced settings are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from common import machine, write_result
from curve import draw, parse_setting
from ecar import Pipeline


def settings_of(files: list[Path]) -> list[str]:
    """Each setting once."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = [x["setting"] for x in lines if "flops" in x and "teacher-forced" not in x["setting"]]
    return list(dict.fromkeys(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in ("ecar", "dit"):
        parser.add_argument(f"--{side}", type=Path, nargs="+", required=True)
        parser.add_argument(f"--{side}-model", required=True)
    parser.add_argument("--images", type=int, default=100, help="a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipes = {
        side: Pipeline.from_pretrained(getattr(args, f"{side}_model"), dtype=torch.bfloat16, device="cpu")
        for side in ("ecar", "dit")
    }
    runs = [(side, s) for side in pipes for s in settings_of(getattr(args, side))]
    runs.sort(key=lambda run: run[1])  # both sides in turns
    taken: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    for pipe in pipes.values():
        draw(pipe, pipe.settings(2), args.images)  # warm
    for side, setting in tqdm(runs * args.repeats, unit="run"):
        pipe = pipes[side]
        _, seconds = draw(pipe, parse_setting(setting, pipe), args.images)
        taken[side, setting].append(seconds / args.images)
    record = {
        "machine": machine(),
        "dtype": "bf16",
        "batch": args.images,
        "repeats": args.repeats,
        **{side: {s: round(median(taken[side, s]), 6) for o, s in runs if o == side} for side in pipes},
    }
    write_result(record, args.out)


if __name__ == "__main__":
    main()
