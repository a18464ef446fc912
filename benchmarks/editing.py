"""How good edits of held-out photographs are, and what they cost: holes, enlargements, strength, FLOPs and seconds.

    python benchmarks/editing.py butterflies butterflies/val.parquet --reference butterflies/train.parquet --num 200 \\
        --picture editing.png --out editing.json

A model is a bundled name, a folder or a Hub id; DiT, of one stage, is edited by the same replacement of what is known
at every solver step, at its own noise level. ``--steps``, ``--guidance`` and ``--solver`` set either side.

``holes``: a quarter (the middle), a half (below) and brush strokes of 30%, other ones in every picture, drawn anew with
the picture's own class.

- ``finished``, ``reconstructed``: Frechet distance (FD) and KID x 1000 against the real pictures of --reference. The
  second is decode(encode(picture)), in the same hole: no model can do better than its tokenizer. ``real``: the pictures
  themselves. The network of the features and N stand beside each figure.
- ``accuracy``: share that a classifier takes for the class asked for. The classifier is that of --classifier, or else a
  linear regression on the features of --reference, which judges with the same network as FD.
- ``seam``: mean difference of the two pixels on both sides of the border, as a multiple of that of the real pictures: 1
  is a border that cannot be told.
- ``rms``: distance from the real picture inside the hole, in 0..255; ``rms_of_others``: that of other real pictures.

``enlarge``: pictures reduced 2 and 4 times (mean of squares of pixels) and enlarged again, beside bicubic enlargement
and the reconstruction. PSNR, ST-LPIPS (null without the package stlpips-pytorch) and FD are against the originals;
``rms_of_input`` is the distance of the result, reduced again, from the small picture.

``strength``: mean RMS distance from the picture where all of it is drawn anew at strengths 0.1 to 1 (a new picture),
and from the reconstruction at the smallest.

``cost``: FLOPs of an edit and of a new picture, and seconds of each at a batch, measured in turns in one process.

--picture shows rows of: picture, hole, finished with two seeds, what was hidden; and of: small picture, bicubic,
enlarged with two seeds, original. The last line printed is the record, one JSON object.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoders import psnr
from common import machine, seconds_of, write_result
from ecar import Pipeline
from ecar.cli.options import output_file, torch_dtype, usable_dtype
from ecar.cost.flops import count_flops, flops_of, sampling_flops
from ecar.evaluation.classifier import classifier_fingerprint, linear_classifier, load_classifier, predict
from ecar.evaluation.extractors import DISTANCE_NAMES, Extractor, extract, get_extractor
from ecar.evaluation.figures import check_classes, check_labels, measure
from ecar.evaluation.metrics import Gaussian, frechet_distance
from ecar.evaluation.reference import Reference, read_images, reference_from_images
from ecar.evaluation.samples import Samples
from ecar.pretrained.folders import weights_fingerprint
from ecar.sampling.edit import Edit
from ecar.sampling.loop import sample_latents
from edits import (
    Subject,
    border,
    enlarged_rows,
    hole_rows,
    holes,
    laid_in,
    over,
    reduced,
    resized,
    rms,
    sheet,
    shrunk,
    signed,
    square_inside,
)
from vgg import Distance, st_lpips

PARTS = ("holes", "enlarge", "strength", "cost")
FACTORS = (2, 4)
STRENGTHS = tuple(step / 10 for step in range(1, 11))
_TURNS = 5  # of the clock
_VARIED = 16  # pictures of the strengths

Recognise = Callable[[Tensor], Tensor]  # images (N, 3, H, W) uint8 -> class ids (N,)


@dataclass(frozen=True)
class Eyes:
    """What looks at pictures.

    Attributes:
        reference: real pictures to compare with, where some were given.
        recognise: a classifier, where there are classes.
        judge: what the classifier is.
    """

    extractor: Extractor
    reference: Reference | None = None
    recognise: Recognise | None = None
    judge: dict[str, str] | None = None

    def scores(self, images: Tensor, labels: list[int | None]) -> dict[str, Any]:
        """FD, KID and more of images (N, 3, H, W) uint8 against the reference, and the share that is recognised."""
        found = {} if self.reference is None else measure(Samples(images, None), self.reference, self.extractor)
        if self.recognise is None:
            return {**found, "accuracy": None}
        right = self.recognise(images) == torch.tensor(labels)
        return {**found, "accuracy": round(float(right.double().mean()), 4)}


def measure_holes(subject: Subject, eyes: Eyes) -> dict[str, Any]:
    """Finished holes, beside reconstructions and the real pictures."""
    images, rebuilt = subject.images, subject.rebuild()
    record: dict[str, Any] = {"real": eyes.scores(images, subject.labels)}
    for name, masks in holes(*subject.side, len(images)).items():
        edits = subject.redrawing(masks)
        finished = subject.draw(edits)
        seam, usual = (statistics.fmean(map(border, some, masks)) for some in (finished, images))
        squares, others = (statistics.fmean(map(square_inside, some, images, masks))
                           for some in (finished, images.roll(1, 0)))  # fmt: skip
        record[name] = {
            "share": round(statistics.fmean(mask.mean() for mask in masks), 3),
            "seam": round(seam / max(usual, 1e-9), 3),
            "rms": round(math.sqrt(squares), 1),
            "rms_of_others": round(math.sqrt(others), 1),
            "finished": eyes.scores(finished, subject.labels),
            "reconstructed": eyes.scores(laid_in(edits, rebuilt), subject.labels),
        }
        print(name, record[name], flush=True)
    return record


def measure_enlargements(subject: Subject, extractor: Extractor, distance: Distance | None) -> dict[str, Any]:
    """Enlarged pictures against the originals, beside bicubic ones; None where the model has too few stages."""
    images, rebuilt, record = subject.images, subject.rebuild(), dict[str, Any]()
    originals = Gaussian.of(extract(extractor, images)[0])
    for factor in FACTORS:
        if not subject.enlarges(factor):
            record[f"{factor}x"] = None
            continue
        small = shrunk(images, factor)
        results = {
            "enlarged": subject.draw(subject.enlarging(small, factor)),
            "bicubic": resized(small, *subject.side, Image.Resampling.BICUBIC),
            "reconstructed": rebuilt,
        }
        record[f"{factor}x"] = {
            name: {
                "psnr": round(float(over(psnr, images, result).mean()), 2),
                "st_lpips": perceived(distance, images, result),
                "rms_of_input": round(float(over(rms, reduced(result, factor), small).square().mean().sqrt()), 2),
                DISTANCE_NAMES[extractor.name]: round(
                    frechet_distance(Gaussian.of(extract(extractor, result)[0]), originals), 4
                ),
            }
            for name, result in results.items()
        }
        print(f"{factor}x", record[f"{factor}x"], flush=True)
    return record


def perceived(distance: Distance | None, images: Tensor, others: Tensor) -> float | None:
    """Mean distance of images (N, 3, H, W) uint8 by a network that takes them in [-1, 1]; None where it is missing."""
    if distance is None:
        return None
    return round(float(over(lambda one, other: distance(signed(one), signed(other)), images, others).mean()), 4)


def measure_strength(subject: Subject) -> dict[str, Any]:
    """Mean distance from the picture by strength."""
    some = subject.first(min(_VARIED, len(subject.images)))
    everything, rebuilt = [None] * len(some.images), some.rebuild()
    varied = [some.draw(some.redrawing(everything, strength)) for strength in STRENGTHS if strength < 1]
    varied.append(some.generate())  # at 1 nothing of the picture is left
    means = [float(rms(images, some.images).mean()) for images in varied]
    return {
        "pictures": len(some.images),
        "rms": {str(strength): round(mean, 2) for strength, mean in zip(STRENGTHS, means, strict=True)},
        "grows": all(after > before for before, after in pairwise(means)),
        "rms_of_reconstruction": round(float(rms(rebuilt, some.images).mean()), 2),
        f"rms_from_reconstruction_at_{STRENGTHS[0]}": round(float(rms(varied[0], rebuilt).mean()), 2),
    }


def measure_cost(subject: Subject, device: torch.device) -> dict[str, Any]:
    """FLOPs of one edit and of one new picture; seconds of one in a batch, in turns."""
    some = subject.first(subject.batch)
    middle, small = holes(*some.side, len(some.images))["quarter"], shrunk(some.images, 2)
    kinds: dict[str, Callable[[Subject, int], list[Edit]]] = {
        "quarter": lambda of, count: of.redrawing(middle[:count]),
        "strength 0.5": lambda of, count: of.redrawing([None] * count, 0.5),
    }
    if some.enlarges(2):
        kinds["enlarged 2x"] = lambda of, count: of.enlarging(small[:count], 2)
    record: dict[str, Any] = {"new picture": {"flops": sampling_flops(some.pipe, some.settings)}}
    calls: dict[str, Callable[[], object]] = {"new picture": some.generate}
    for name, make in kinds.items():
        record[name] = {"flops": edit_flops(some.first(1), make)}
        calls[name] = lambda make=make: some.draw(make(some, len(some.images)))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_TURNS + 1):
        for name, call in calls.items():
            took = seconds_of(call, device)
            if turn:  # the first warms up
                seconds[name].append(took / len(some.images))
    plain, plain_flops = statistics.median(seconds["new picture"]), record["new picture"]["flops"]["total"]
    for name, times in seconds.items():
        record[name] |= {
            "seconds": round(statistics.median(times), 5),
            "seconds_all": [round(t, 5) for t in times],
            "flops_of_new_picture": round(record[name]["flops"]["total"] / plain_flops, 3),
            "seconds_of_new_picture": round(statistics.median(times) / plain, 3),
        }
    return {"batch": len(some.images), **record}


def edit_flops(one: Subject, make: Callable[[Subject, int], list[Edit]]) -> dict[str, int]:
    """FLOPs of the edit of one picture: ``encoder``, ``model``, ``decoder``, ``total``."""
    edits: list[Edit] = []
    encoder = flops_of(lambda: edits.extend(make(one, 1)))
    drawing = count_flops(one.pipe, lambda labels, noise: sample_latents(
        one.pipe.model, labels, noise, one.settings_of(edits[0]), known=edits[0].known(noise)
    ))  # fmt: skip
    return {"encoder": encoder, **drawing, "total": encoder + drawing["total"]}


def picture(subject: Subject, parts: list[str]) -> Image.Image:
    """The sheet of the parts that have pictures."""
    cells = hole_rows(subject, 6) if "holes" in parts else []
    for factor in FACTORS:
        if "enlarge" in parts and subject.enlarges(factor):
            cells += enlarged_rows(subject, factor, 2)
    return sheet(cells)


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled name, folder or Hub id")
    parser.add_argument("data", help="pictures that the model was not trained on: parquet, folder, Hub data set, tars")
    parser.add_argument("--reference", help="other real pictures, to compare with")
    parser.add_argument("--reference-num", type=int, help="use only so many (a seeded choice)")
    parser.add_argument("--classifier", type=Path, help="made by ecar evaluate --classifier")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--num", type=int, default=200, help="pictures (a seeded choice)")
    parser.add_argument("--steps", nargs="+", type=int, help="solver steps, one per stage; default: the model's")
    parser.add_argument("--solver", help="euler, heun or ab2; default: the model's")
    parser.add_argument("--guidance", nargs="+", type=float, help="one number, or one per stage; default: the model's")
    parser.add_argument("--batch-size", type=int, default=8, help="edits that are drawn, and timed, at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ecar"), help="folder of reference features")
    parser.add_argument("--picture", help="sheet of edits to write (.png)")
    parser.add_argument("--out", help="record to write (.json)")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """Measure, print, write; ValueError for wrong input."""
    start = time.perf_counter()
    if args.num < 2 or args.batch_size < 1:
        raise ValueError("--num must be at least 2 and --batch-size at least 1")
    out, sheet_file = args.out and output_file(args.out, (".json",)), None
    if args.picture:
        sheet_file = output_file(args.picture, (".png",), "--picture")
        if not {"holes", "enlarge"} & set(args.parts):
            raise ValueError("--picture shows holes and enlargements: add one of them to --parts")
    dtype = usable_dtype(args.dtype, args.device)
    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=torch_dtype(dtype))
    settings = pipe.settings(args.steps, one_or_more(args.guidance), args.solver)
    height, width = pipe.model.config.image_side
    images, labels, names = read_images(args.data, "test", height, width, args.num)
    classes = bool(names) and pipe.model.config.num_classes > 0
    if classes:
        check_classes(pipe.model.config, args.data, names)
    if len(images) < 2:
        raise ValueError(f"{args.data} has {len(images)} picture, and two are needed")
    pipe.tokenizer.check_images(signed(images))
    subject = Subject(pipe, settings, images, labels.tolist() if classes else [None] * len(images), args.batch_size)
    eyes = look(args, subject, names if classes else ())
    record: dict[str, Any] = {
        "model": args.model, "weights": weights_fingerprint(args.model), "decoder": pipe.decoder.fingerprint(),
        "parameters": pipe.model.num_parameters(), "dtype": dtype, "settings": settings.to_json(), "data": args.data,
        "pictures": len(images), "classifier": eyes.judge,
        "extractor": {"name": eyes.extractor.name, "fingerprint": eyes.extractor.fingerprint},
        "reference": eyes.reference and {"name": args.reference, "num": eyes.reference.count,
                                         "fingerprint": eyes.reference.fingerprint},
        "machine": machine(args.device),
    }  # fmt: skip
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "holes": lambda: measure_holes(subject, eyes),
        "enlarge": lambda: measure_enlargements(subject, eyes.extractor, st_lpips()),
        "strength": lambda: measure_strength(subject),
        "cost": lambda: measure_cost(subject, pipe.model.device),
    }
    record |= {part: parts[part]() for part in PARTS if part in args.parts}
    if sheet_file is not None:
        picture(subject, args.parts).save(sheet_file)
    write_result({**record, "seconds": round(time.perf_counter() - start, 1)}, out)


def look(args: argparse.Namespace, subject: Subject, names: tuple[str, ...]) -> Eyes:
    """What looks at the pictures; ``names`` of the classes, where model and data have some."""
    extractor, reference, judge = get_extractor(args.extractor, device=args.device), None, None
    if args.reference is None and args.reference_num is not None:
        raise ValueError("--reference-num would change nothing: give --reference, or leave it out")
    if args.classifier is not None:
        check_labels(args.data, names)
        judge = load_classifier(args.classifier, names)
    if args.reference is not None:
        real = read_images(args.reference, "train", *subject.side, args.reference_num)
        if judge is None and names and real.class_names:
            check_classes(subject.pipe.model.config, args.reference, real.class_names)
        reference = reference_from_images(args.reference, *real, extractor, args.cache.expanduser())
    if judge is not None:
        about = {"file": str(args.classifier), "fingerprint": classifier_fingerprint(judge)}
        return Eyes(extractor, reference, lambda images: predict(judge, images)[0], about)
    if not names or reference is None or not reference.class_names:
        return Eyes(extractor, reference)
    assert reference.features is not None and reference.labels is not None
    classify = linear_classifier(reference.features, reference.labels, len(names))
    about = {"linear regression": f"on {extractor.name} features of {args.reference}"}
    return Eyes(extractor, reference, lambda images: classify(extract(extractor, images)[0]), about)


def one_or_more(values: list[float] | None) -> list[float] | float | None:
    """A single number holds for every stage."""
    return values[0] if values is not None and len(values) == 1 else values


if __name__ == "__main__":
    main()
