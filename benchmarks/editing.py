"""How well filled holes join the picture around them, on real pictures of which a part is hidden.

    python benchmarks/editing.py cifar10 cifar10/test.parquet --num 200 --out editing.json

A hole of a quarter (the middle) and one of a half (below) are drawn anew with the picture's own class. ``seam`` is the
mean difference of the two pixels on both sides of the border, as a multiple of that of the real pictures: 1 is a border
that cannot be told. ``rms`` is the distance from the real picture inside the hole, in 0..255; ``rms_of_others`` is that
of other real pictures, put into the same hole. Prints one JSON object as the last line.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from ecar import Pipeline
from ecar.data.source import load_source
from ecar.files.images import decode_image, fit
from ecar.pretrained.folders import weights_fingerprint

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Seams and contents of filled holes."""

    model: Annotated[str, tyro.conf.Positional]
    """Bundled name, folder or Hub id."""
    data: Annotated[str, tyro.conf.Positional]
    """Pictures that the model was not trained on: folder, parquet file, or any other ``--data``."""
    num: int = 200
    """Pictures."""
    steps: tuple[int, ...] | None = None
    """Solver steps, one per stage; default: the model's."""
    solver: str | None = None
    """euler, heun or ab2; default: the model's."""
    out: str | None = None
    """File for the result (.json)."""


def border(image: np.ndarray, box: Box) -> np.ndarray:
    """|inside - outside| of all neighbours across the border of ``box`` that lie in the image (H, W, 3)."""
    values, (x, y, width, height) = image.astype(float), box
    found = []
    for turned, (first, last), (low, high) in (
        (values, (y, y + height), (x, x + width)),
        (values.transpose(1, 0, 2), (x, x + width), (y, y + height)),
    ):
        found += [turned[at - 1 : at + 1, low:high] for at in (first, last) if 0 < at < len(turned)]
    return np.concatenate([np.abs(pair[0] - pair[1]).ravel() for pair in found])


def measure(
    pipe: Pipeline, pictures: list[np.ndarray], labels: list[str], box: Box, options: Options
) -> dict[str, float]:
    """Fill ``box`` of every picture, picture i with seed i."""
    inside = np.s_[box[1] : box[1] + box[3], box[0] : box[0] + box[2]]
    settings = pipe.settings(steps=options.steps, solver=options.solver)
    seams, real_seams, squares, others = [], [], [], []
    for seed, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        filled = pipe.edit(Image.fromarray(picture), label=label, mask=box, seeds=[seed], settings=settings).images[0]
        seams.append(border(np.asarray(filled), box).mean())
        real_seams.append(border(picture, box).mean())
        real, other = picture[inside].astype(float), pictures[seed - 1][inside]
        squares.append(((np.asarray(filled)[inside] - real) ** 2).mean())
        others.append(((other - real) ** 2).mean())
    return {
        "seam": round(float(np.mean(seams) / np.mean(real_seams)), 3),
        "rms": round(float(np.mean(squares) ** 0.5), 1),
        "rms_of_others": round(float(np.mean(others) ** 0.5), 1),
    }


def main() -> None:
    """Measure, print, write."""
    options = tyro.cli(Options)
    pipe, source = Pipeline.from_pretrained(options.model), load_source(options.data, max_images=options.num)
    height, width = pipe.model.config.image_side
    pictures = [fit(decode_image(source.read(i)), height, width) for i in range(len(source))]
    labels = [source.class_names[label] for label in source.labels]
    holes: dict[str, Box] = {
        "quarter": (width // 4, height // 4, width // 2, height // 2),
        "half": (0, height // 2, width, height - height // 2),
    }
    start = time.perf_counter()
    record = {
        "model": options.model,
        "weights": weights_fingerprint(options.model),
        "data": options.data,
        "pictures": len(pictures),
        "settings": pipe.settings(steps=options.steps, solver=options.solver).to_json(),
        **{name: measure(pipe, pictures, labels, box, options) for name, box in holes.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
