"""Samples of several models next to each other, one row per class, the same seeds, not selected; real images last.

    python benchmarks/side_by_side.py --systems "ECAR=RUN/final=5,3" "DiT=DIT/final=10:2:ab2:0.4" \\
        --data test.parquet --out side.png

A system is NAME=MODEL=SETTING with a setting of curve.py. Prints each system's FLOPs per image as JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from curve import draw, parse_setting
from ecar import Pipeline
from ecar.cost.flops import sampling_flops
from ecar.evaluation.reference import read_images
from ecar.evaluation.samples import Samples
from ecar.sampling.pictures import grid

GAP, CAPTION = 16, 24


def rows_of_classes(samples: Samples, classes: range, per_class: int, scale: int) -> Image.Image:
    """The first ``per_class`` images of each class as a row."""
    assert samples.labels is not None
    chosen = [i for c in classes for i in (samples.labels == c).nonzero().flatten()[:per_class]]
    images = samples.images[torch.stack(chosen)].permute(0, 2, 3, 1).numpy()
    return grid([Image.fromarray(image) for image in images], per_class, scale=scale)


def sheet(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """Panels of one height from left to right, each under its name."""
    lefts = [0]
    for _, panel in panels:
        lefts.append(lefts[-1] + panel.width + GAP)
    page = Image.new("RGB", (lefts[-1] - GAP, panels[0][1].height + CAPTION), "white")
    pen = ImageDraw.Draw(page)
    for (name, panel), (left, _) in zip(panels, pairwise(lefts), strict=True):
        page.paste(panel, (left, CAPTION))
        pen.text((left + 2, 4), name, fill="black", font_size=15)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", required=True, metavar="NAME=MODEL=SETTING")
    parser.add_argument("--data", required=True, help="real images")
    parser.add_argument("--classes", type=int, help="so many of them, evenly spaced; default: all")
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    panels, height, width, rows = [], 0, 0, range(0)
    for system in args.systems:
        name, model, setting = system.split("=")
        pipe = Pipeline.from_pretrained(model)
        settings = parse_setting(setting, pipe)
        classes, (height, width) = pipe.model.config.num_classes, pipe.model.config.image_side
        rows = range(0, classes, max(1, classes // (args.classes or classes)))[: args.classes]
        gflop = sampling_flops(pipe, settings)["total"] / 1e9
        samples, _ = draw(pipe, settings, classes * args.per_class)
        panels.append((f"{name}: {gflop:.2f} GFLOP", rows_of_classes(samples, rows, args.per_class, args.scale)))
        print(json.dumps({"system": name, "model": Path(model).name, "setting": setting, "gflop": round(gflop, 3)}))
    images, labels, _ = read_images(args.data, "test", height, width, None)
    panels.append(("real test images", rows_of_classes(Samples(images, labels), rows, args.per_class, args.scale)))
    sheet(panels).save(args.out)


if __name__ == "__main__":
    main()
