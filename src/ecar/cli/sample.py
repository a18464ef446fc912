"""``ecar sample``: images from a model, as a grid (.png) or, from any number of processes, an array (.npz)."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ecar.cli.flags import AdaptedModelFlags, CandidateFlags, ModelOrDefault, SamplingFlags, together
from ecar.cli.options import parse
from ecar.cli.pictures import PictureFlags

if TYPE_CHECKING:
    from ecar import Pipeline
    from ecar.config import SamplingConfig


_MANY_CLASSES = 20  # with a row for each, the sheet would have no end


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Generate images from a model."""

    model: ModelOrDefault = "butterflies"
    """Bundled name, folder or Hub id."""
    classes: str = "all"
    """Class names or ids with commas between, `all`, or `none` (no class)."""
    per_class: int = 0
    """Images per class; 0 chooses 8, or 1 where there are more than 20 classes."""
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
    if options.per_class < 0 or options.batch_size < 1:
        raise ValueError("--per-class must be 0 or more, and --batch-size at least 1")
    if options.files.one_array:
        _one_array(options)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes write one array: give --out FILE.npz without --stages and --gif")
    files, compute = options.files, options.compute.usable()
    pipe = compute.load(options.model)
    settings, draw = options.sampling.settings(pipe), options.selection.best_of(pipe) or pipe
    options, labels = _labels(options, pipe)
    files.check_size(len(labels), options.per_class, pipe.model.config.image_side)
    start, seeds = time.perf_counter(), range(options.seed, options.seed + len(labels))
    output = draw(
        labels, seeds=seeds, settings=settings, batch_size=options.batch_size,
        return_stages=bool(files.stages or files.gif), progress=True,
    )  # fmt: skip
    record = _record(options, compute, settings, len(labels), time.perf_counter() - start, sum(output.drawn))
    files.write(output, options.per_class, json.dumps(record), labelled=pipe.model.config.num_classes > 0)
    print(json.dumps(record))


def _one_array(options: SampleOptions) -> None:
    """Write an .npz in as many processes as there are."""
    from ecar.evaluation.making import configuration, make_samples
    from ecar.refine import identity

    with together(options.compute.device, "while sampling, finished batches stay") as (world, device):
        compute = replace(options.compute, device=device).usable()
        pipe = world.first_then_others(lambda: compute.load(options.model))
        settings, best = options.sampling.settings(pipe), options.selection.best_of(pipe)
        options, labels = _labels(options, pipe)
        whose: dict[str, object] = {}
        if world.rank == 0:
            whose = {"classes": options.classes, "per_class": options.per_class, **asdict(compute),
                     **identity(pipe, best), "configuration": configuration(pipe),
                     "device": pipe.model.device.type}  # fmt: skip
        start, out = time.perf_counter(), Path(options.files.out).expanduser()
        parts = out.with_name(f"{out.name}.parts")
        made = make_samples(
            pipe, labels, parts, out, seed=options.seed, settings=settings, record=whose, batch=options.batch_size,
            sampler=best, world=world,
        )  # fmt: skip
        if made is not None:
            missing, samples = made
            shutil.rmtree(parts)
            took = time.perf_counter() - start
            record = _record(options, compute, settings, missing, took, round(samples.drawn * len(labels)))
            record |= {"images": len(labels), "resumed": len(labels) - missing, "processes": world.size}
            print(json.dumps(record))


def _record(
    options: SampleOptions, compute: AdaptedModelFlags, settings: SamplingConfig, count: int, seconds: float,
    drawn: int,
) -> dict[str, object]:  # fmt: skip
    """What was made, how, and how fast."""
    from ecar import __version__
    from ecar.pretrained.folders import weights_fingerprint

    return {
        "model": options.model, "weights": weights_fingerprint(options.model), "ecar": __version__,
        "images": count, "seconds": round(seconds, 3), "images_per_second": round(count / seconds, 2),
        "seed": options.seed, "classes": options.classes, "per_class": options.per_class,
        "settings": settings.to_json(), **asdict(options.selection), **asdict(compute),
        "device": options.compute.device, "drawn": drawn, "out": options.files.out,
    }  # fmt: skip


def _labels(options: SampleOptions, pipe: Pipeline) -> tuple[SampleOptions, list[int | str | None]]:
    """The class of each image, and the options with the number per class that was chosen."""
    classes = _classes(options.classes, pipe)
    options = replace(options, per_class=options.per_class or (1 if len(classes) > _MANY_CLASSES else 8))
    return options, [label for label in classes for _ in range(options.per_class)]


def _classes(text: str, pipe: Pipeline) -> list[int | str | None]:
    count = pipe.model.config.num_classes
    if text == "none" or (text == "all" and count == 0):
        return [None]
    if text == "all":
        return list(range(count))
    if not text.strip(" ,"):
        raise ValueError("--classes is empty; give names or ids, all, or none")
    return [*pipe.class_ids(text)]
