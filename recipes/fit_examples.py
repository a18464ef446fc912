"""Make folders of pictures as users have them, run `ecar fit` on each, and write the record of results/fit.

    python recipes/fit_examples.py --butterflies train.parquet --dogs train.parquet --out runs/fit --minutes 10

Sets: butterflies of 100 species at 64 and 256 pixels; icons that are drawn here (PNG with alpha, 64x64, a folder per
kind); 300 photographs of dogs in one folder; 1,000 photographs of dogs without classes; and 5 of them, which are
refused. --sets chooses some. The same command again goes on. A set's record and a sheet of samples go to --record.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ecar.data.source import load_source
from ecar.files.commit import source_commit
from ecar.sampling.pictures import grid
from ecar.sampling.pipeline import Pipeline

SETS = ("butterflies_64", "butterflies_256", "icons", "one_class", "no_classes", "five")
ICONS = 60  # of a kind
_LARGE = 4  # icons are drawn so many times as large, for smooth edges
_SHEET = 8  # samples of a set on the sheet
_CELL = 72  # pixels of one of them


def _points(count: int, radius: float, inner: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a star, or of a polygon where ``inner`` is ``radius``, around the middle."""
    angles = [turn + math.pi * i / count for i in range(2 * count)]
    return [(radius * math.cos(a), radius * math.sin(a)) if i % 2 else (inner * math.cos(a), inner * math.sin(a))
            for i, a in enumerate(angles)]  # fmt: skip


def draw_icon(kind: str, random: np.random.Generator) -> Image.Image:
    """One icon, RGBA 64x64 on a transparent background: colours, sizes and places vary."""
    side = 64 * _LARGE
    image = Image.new("RGBA", (side, side))
    pen, middle = ImageDraw.Draw(image), side / 2 + random.uniform(-0.06, 0.06, 2) * side
    size = side * random.uniform(0.28, 0.42)
    hue, other = (tuple(int(v) for v in random.integers(40, 230, 3)) for _ in range(2))
    line = int(size * 0.08)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        x, y = middle
        return x + left * size, y + top * size, x + right * size, y + bottom * size

    def shape(points: list[tuple[float, float]], fill: tuple[int, ...]) -> None:
        pen.polygon([(middle[0] + x * size, middle[1] + y * size) for x, y in points], fill=fill)

    if kind == "star":
        shape(_points(int(random.integers(5, 8)), 1.0, random.uniform(0.4, 0.55), random.uniform(0, 1)), hue)
    elif kind == "sun":
        shape(_points(12, 1.0, 0.72, random.uniform(0, 1)), (240, 170 + int(random.integers(60)), 40))
        pen.ellipse(box(-0.55, -0.55, 0.55, 0.55), fill=(250, 220, 70))
    elif kind == "house":
        pen.rectangle(box(-0.7, -0.1, 0.7, 0.9), fill=hue)
        shape([(-0.95, -0.1), (0, -0.95), (0.95, -0.1)], other)
        pen.rectangle(box(-0.15, 0.35, 0.2, 0.9), fill=(90, 60, 40))
    elif kind == "tree":
        pen.rectangle(box(-0.12, 0.3, 0.12, 1.0), fill=(110, 75, 45))
        green = (30 + int(random.integers(60)), 120 + int(random.integers(80)), 50)
        for top in (-1.0, -0.6, -0.2):
            shape([(-0.45 - 0.3 * (top + 1), top + 0.75), (0, top), (0.45 + 0.3 * (top + 1), top + 0.75)], green)
    elif kind == "cup":
        pen.arc(box(0.3, -0.35, 1.0, 0.4), -100, 100, fill=hue, width=2 * line)
        pen.rounded_rectangle(box(-0.75, -0.55, 0.55, 0.8), radius=size * 0.25, fill=hue)
        pen.ellipse(box(-0.6, -0.62, 0.4, -0.36), fill=other)
    elif kind == "heart":
        pen.ellipse(box(-0.9, -0.8, 0.05, 0.15), fill=hue)
        pen.ellipse(box(-0.05, -0.8, 0.9, 0.15), fill=hue)
        shape([(-0.84, -0.1), (0.84, -0.1), (0, 0.95)], hue)
    elif kind == "fish":
        shape([(-0.95, -0.5), (-0.95, 0.5), (-0.3, 0.0)], other)
        pen.ellipse(box(-0.6, -0.5, 0.95, 0.5), fill=hue)
        pen.ellipse(box(0.5, -0.2, 0.68, -0.02), fill=(20, 20, 20))
    else:  # a letter's envelope
        pen.rounded_rectangle(box(-0.95, -0.6, 0.95, 0.6), radius=size * 0.08, fill=hue)
        pen.line([box(-0.85, -0.5, 0, 0)[:2], box(0, 0.2, 0, 0)[:2], box(0.85, -0.5, 0, 0)[:2]], fill=other, width=line)
    return image.resize((64, 64), Image.Resampling.LANCZOS)


def make_icons(folder: Path) -> Path:
    """``ICONS`` of each of eight kinds."""
    random = np.random.default_rng(0)
    for kind in ("cup", "envelope", "fish", "heart", "house", "star", "sun", "tree"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(ICONS):
            draw_icon(kind, random).save(folder / kind / f"{number:03d}.png")
    return folder


def take(data: str, folder: Path, count: int, label: int | None = None, into: str = "") -> Path:
    """The first ``count`` pictures (of a class) as files."""
    source = load_source(data)
    rows = [row for row in range(len(source)) if label is None or source.labels[row] == label]
    random = np.random.default_rng(0)
    (folder / into).mkdir(parents=True, exist_ok=True)
    for row in sorted(random.permutation(rows)[:count].tolist()):
        data_of = source.read(row)
        suffix = ".jpg" if data_of[:2] == b"\xff\xd8" else ".avif"
        (folder / into / f"{row:06d}{suffix}").write_bytes(data_of)
    return folder


def pictures(args: argparse.Namespace, name: str) -> tuple[str, list[str]]:
    """What `ecar fit` is given: data and further options."""
    if name.startswith("butterflies"):
        return args.butterflies, ["--resolution", "64"] if name.endswith("64") else []
    folder = args.out / "pictures" / name
    if not folder.exists():
        part = folder.with_name(f".{name}.part")
        if name == "icons":
            make_icons(part)
        else:
            count, label, into = {"one_class": (300, 5, "dog"), "no_classes": (1000, None, ""), "five": (5, None, "")}[
                name
            ]
            take(args.dogs, part, count, label, into)
        part.rename(folder)
    return str(folder), ["--no-flip"] if name == "icons" else []


def fit(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run the command; its record for results/fit."""
    data, options = pictures(args, name)
    out = args.out / name
    words = ["fit", data, "--out", str(out), "--minutes", f"{args.minutes:g}", *options, *args.options.split()]
    done = subprocess.run(
        [sys.executable, "-m", "ecar", *words], stdout=subprocess.PIPE, stderr=None, text=True, env={**os.environ}
    )
    print(done.stdout, flush=True)
    record: dict[str, Any] = {"set": name, "options": options, "minutes": args.minutes, "exit": done.returncode}
    if done.returncode:
        return record | {"commit": source_commit()}
    work = out / "work"
    plan, found = (json.loads((work / file).read_text()) for file in ("plan.json", "done.json"))
    evaluation = found.get("evaluate", {}).get("evaluation", {})
    figures = {key: {k: v for k, v in part.items() if k != "picture"} for key, part in evaluation.items()
               if isinstance(part, dict)}  # fmt: skip
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    return record | {
        "commit": source_commit(), "pictures": summary["pictures"], "plan": plan["why"], "planned": plan["seconds"],
        "seconds": summary["seconds"], "train": {k: v for k, v in found["train"].items() if k != "command"},
        "guidance": {k: v for k, v in found.get("guidance", {}).items() if k != "command"},
        **{key: figures[key] for key in figures if key.startswith(("metrics", "floor", "tokenizer", "memorisation"))},
    }  # fmt: skip


def row(record: dict[str, Any]) -> str:
    """A line of the table of results/fit: KID x 1000 of samples, reconstructions and training pictures."""
    kid = "KID x 1000 (efficientnet-lite0)"
    lines = ("metrics", "tokenizer's reconstructions of training images", "floor: training images")
    figures = " / ".join(f"{record[line][kid]:.0f}" if line in record else "-" for line in lines)
    taken, trained = sum(record["seconds"].values()) + record["planned"]["check"], record["train"]
    plan, start = record["plan"], re.split("[;:,]", record["plan"]["start"])[0]
    return (
        f"| [{record['set']}]({record['set']}.json) | {plan['pictures'].partition(':')[0]} | "
        f"{plan['resolution'].partition(' ')[0]} | {record['minutes']:g}, {taken / 60:.0f} | "
        f"{100 * trained['seconds'] / taken:.0f}% | {start} | {plan['steps'].partition(':')[0]} | {figures} |"
    )


def sheet(args: argparse.Namespace, names: list[str]) -> None:
    """A row of samples of every set, classes in turn."""
    cells: list[Image.Image] = []
    for name in names:
        made = args.out / name / "work" / "samples" / "samples.npz"
        if made.exists():  # image i has class i modulo their number
            images = [Image.fromarray(pixels) for pixels in np.load(made)["arr_0"][:_SHEET]]
        else:
            pipe = Pipeline.from_pretrained(args.out / name, device="cpu")
            count = pipe.model.config.num_classes
            images = pipe(labels=[i % count for i in range(_SHEET)] if count else None, seeds=range(_SHEET)).images
        cells += [image.resize((_CELL, _CELL)) for image in images]
    grid(cells, _SHEET).convert("RGB").save(args.record / "samples.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--butterflies", required=True, help="photographs of butterflies, as `ecar fit` takes them")
    parser.add_argument("--dogs", required=True, help="photographs of dogs")
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures and models")
    parser.add_argument("--record", type=Path, default=Path("results/fit"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--options", default="", help="further options of `ecar fit`")
    args = parser.parse_args()
    args.record.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        record = fit(args, name)
        (args.record / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(
            row(record) if not record["exit"] else f"{name}: refused or failed, exit code {record['exit']}", flush=True
        )
    done = [name for name in SETS if (args.out / name / "report.html").exists()]
    if done:
        sheet(args, done)


if __name__ == "__main__":
    main()
