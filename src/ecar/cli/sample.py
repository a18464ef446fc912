"""``ecar sample``: images from a model, as a grid (.png) or an array (.npz)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from ecar.cli.flags import AdaptedModelFlags, CandidateFlags, SamplingFlags
from ecar.cli.options import parse
from ecar.cli.pictures import PictureFlags

if TYPE_CHECKING:
    from ecar import Pipeline


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Generate images from a model."""

    model: Annotated[str, tyro.conf.Positional] = "fashion"
    """Bundled name, folder or Hub id."""
    classes: str = "all"
    """Class names or ids with commas between, `all`, or `none` (no class)."""
    per_class: int = 8
    """Images per class."""
    seed: int = 0
    """Seed of the first image; image i uses seed + i."""
    batch_size: int = 64
    """Samples computed at once."""
    files: PictureFlags = field(default_factory=PictureFlags)
    """Files to write."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    """How the model is sampled."""
    selection: CandidateFlags = field(default_factory=CandidateFlags)
    """Choosing among candidates."""
    compute: AdaptedModelFlags = field(default_factory=AdaptedModelFlags)
    """How the model is computed."""


OPTIONS = SampleOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, check, sample, write; prints one JSON object as the last line."""
    options = parse(SampleOptions, arguments, "sample")
    if options.per_class < 1:
        raise ValueError("--per-class must be at least 1")
    from ecar import __version__
    from ecar.pretrained.folders import weights_fingerprint

    files, compute = options.files, options.compute.usable()
    pipe = compute.load(options.model)
    settings, draw = options.sampling.settings(pipe), options.selection.best_of(pipe) or pipe
    labels = [label for label in _classes(options.classes, pipe) for _ in range(options.per_class)]
    files.check_size(len(labels), options.per_class, pipe.model.config.image_side)
    start, seeds = time.perf_counter(), range(options.seed, options.seed + len(labels))
    output = draw(
        labels, seeds=seeds, settings=settings, batch_size=options.batch_size,
        return_stages=bool(files.stages or files.gif), progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    record = {
        "model": options.model, "weights": weights_fingerprint(options.model), "ecar": __version__,
        "images": len(labels), "seconds": round(seconds, 3), "images_per_second": round(len(labels) / seconds, 2),
        "seed": options.seed, "classes": options.classes, "per_class": options.per_class,
        "settings": settings.to_json(), **asdict(options.selection), **asdict(compute), "drawn": sum(output.drawn),
        "out": files.out,
    }  # fmt: skip
    files.write(output, options.per_class, json.dumps(record), labelled=pipe.model.config.num_classes > 0)
    print(json.dumps(record))


def _classes(text: str, pipe: Pipeline) -> list[int | str | None]:
    count = pipe.model.config.num_classes
    if text == "none" or (text == "all" and count == 0):
        return [None]
    if text == "all":
        return list(range(count))
    if not text.strip(" ,"):
        raise ValueError("--classes is empty; give names or ids, all, or none")
    return [*pipe.class_ids(text)]
