"""Quality against sampling cost: one model, many settings, one JSON line each.

    python benchmarks/curve.py --model RUN/final --data test.parquet --train-data train.parquet \\
        --classifier judge.safetensors --settings 8,4 8,4:1.5 16,8:1:heun --out curve.jsonl

A setting is STEPS[:GUIDANCE[:SOLVER[:FROM]]] with FROM the time from which guidance acts. (In records up to 29 November
2026 a word stands before FROM: 25:2:ab2:velocity:0.4 is 25:2:ab2:0.4.) Lines for the floor (other photographs) and for
the tokenizer's reconstructions come first. Settings that the file already holds are not run again.

Without --classifier, a linear classifier is made of the features of --data. For photographs, let --data be the training
images, of which there are enough for a Frechet distance, and --train-data held-out ones. --vgg adds the distances in
VGG16, which shares no ancestry with EfficientNet.

--teacher-forced also samples the last stage from the maps that training images have in the stages before, of the same
classes in the same order: the gap to free running is what these stages do wrong, and what remains the last one's own
error.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common import coarse_guidance
from ecar import Pipeline
from ecar.cli.options import torch_dtype, usable_dtype
from ecar.config import SamplingConfig, differences
from ecar.cost.flops import sampling_flops
from ecar.evaluation.classifier import Classifier, classifier_fingerprint, linear_classifier, load_classifier
from ecar.evaluation.extractors import Extractor, get_extractor
from ecar.evaluation.figures import Recognition, check_classes, figures, look, measure
from ecar.evaluation.metrics import chosen
from ecar.evaluation.reference import Reference, read_images, reference_from_images
from ecar.evaluation.samples import Samples, reconstruct
from ecar.files.commit import source_commit
from ecar.pretrained.folders import weights_fingerprint
from ecar.sampling.known import Known
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.sampling.pictures import from_decoded
from ecar.stages import end_point, noises, pyramid
from vgg import VggExtractor

_SAME = ("weights", "dtype", "extractor", "reference", "num", "judge", "decoder", "seed")  # in all lines of a file


def parse_setting(text: str, pipe: Pipeline) -> SamplingConfig:
    """STEPS[:GUIDANCE[:SOLVER[:FROM]]]; ValueError for another form, or what the model cannot do.

    In the names of settings one number of guidance leaves the last of several stages unguided."""
    parts = text.split(":")
    try:
        steps, guidance, solver, start = [*parts, *("1", "ab2", "0")[len(parts) - 1 :]]
        scales, starts = ([float(x) for x in part.split(",")] for part in (guidance, start))
        counts = [int(s) for s in steps.split(",")]
    except ValueError:
        raise ValueError(f"--settings {text}: give STEPS[:GUIDANCE[:SOLVER[:FROM]]], such as 8,4:1.5:ab2:0.4") from None
    if len(scales) == 1:
        scales = [*coarse_guidance(scales[0], len(pipe.model.plan))]
    return pipe.settings(counts, scales, solver, starts if len(starts) > 1 else starts[0])


@torch.no_grad()
def draw(
    pipe: Pipeline,
    settings: SamplingConfig,
    num: int,
    real: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> tuple[Samples, float]:
    """Balanced samples of seeds from ``seed`` on, and the seconds they took.

    Args:
        real: images and labels whose coarse maps are given.
    """
    model, parts, seconds = pipe.model, [], 0.0
    labels = torch.arange(num) % model.config.num_classes if real is None else real[1][:num]
    for first in range(0, num, 250):
        ids = range(first, min(first + 250, num))
        noise, known = draw_noise([seed + i for i in ids], model.plan, model.config.channels), []
        if real is not None:
            z = pipe.tokenizer.encode(real[0][first : first + len(ids)].float() / 127.5 - 1)
            maps = pyramid(z, len(model.plan))
            other = noises(model.plan, [n.fresh for n in draw_noise([10**9 + i for i in ids], model.plan, z.shape[1])])
            known = [Known.given(end_point(s, m, n)) for s, m, n in zip(model.plan[:-1], maps, other, strict=False)]
        start = time.perf_counter()
        latents = sample_latents(model, labels[first : first + len(ids)], noise, settings, known=known)
        parts.append(from_decoded(pipe.decoder.decode(latents)))
        seconds += time.perf_counter() - start
    return Samples(torch.cat(parts), labels), seconds


def one_of_each(labels: Tensor, num: int, classes: int) -> Tensor:
    """Indices (num,) of different images, chosen at random, the i-th of class i modulo ``classes``: as samples are.

    Raises:
        ValueError: a class has too few.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    found = [order[labels[order] == c] for c in range(classes)]
    if any(len(images) < len(range(c, num, classes)) for c, images in enumerate(found)):
        raise ValueError(f"--teacher-forced needs {num} training images with as many of each class")
    return torch.stack([found[i % classes][i // classes] for i in range(num)])


class Judges:
    """Samples -> all figures: of one extractor, of a second one, and of a classifier, which is linear by default."""

    def __init__(
        self,
        reference: Reference,
        extractor: Extractor,
        classifier: Classifier | None,
        second: tuple[Reference, Extractor] | None,
    ) -> None:
        self.reference, self.extractor, self.second = reference, extractor, second
        self.whole = Recognition(classifier, reference) if classifier else None
        if classifier is None:
            assert reference.features is not None and reference.labels is not None
            self.linear = linear_classifier(reference.features, reference.labels, len(reference.class_names))

    def __call__(self, samples: Samples) -> dict[str, object]:
        record = {} if self.second is None else measure(samples, *self.second)
        seen = look(samples.images, self.extractor, spatial=self.reference.spatial is not None)
        record |= figures(seen, self.reference, self.extractor)
        if self.whole is not None:
            return record | {k: v for k, v in self.whole(samples).items() if "per_class" not in k}
        found = self.linear(seen.features)
        assert samples.labels is not None
        return record | {"classifier_accuracy": round(float((found == samples.labels).double().mean()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="real images to compare with")
    parser.add_argument("--train-data", required=True, help="real images of the floor and the reconstructions")
    parser.add_argument("--classifier", type=Path, help="made by ecar evaluate --classifier")
    parser.add_argument("--vgg", action="store_true", help="needs the package stlpips-pytorch")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--decoder", help="another decoder of the same latents")
    parser.add_argument("--teacher-forced", action="store_true")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first sample: choose settings with other seeds")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ecar").expanduser())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """Draw what the file does not hold yet, judge it, write a line each; ValueError for wrong input."""
    dtype = usable_dtype(args.dtype, "cpu")
    pipe = Pipeline.from_pretrained(args.model, decoder=args.decoder, dtype=torch_dtype(dtype), device="cpu")
    settings = {text: parse_setting(text, pipe) for text in args.settings}
    height, width = pipe.model.config.image_side
    extractor = get_extractor(args.extractor)
    images = read_images(args.data, "test", height, width, None)
    reference = reference_from_images(args.data, *images, extractor, args.cache)
    check_classes(pipe.model.config, reference.name, reference.class_names)
    classifier = load_classifier(args.classifier, reference.class_names) if args.classifier else None
    second = None
    if args.vgg:
        vgg = VggExtractor()
        second = reference_from_images(args.data, *images, vgg, args.cache), vgg
    judges = Judges(reference, extractor, classifier, second)
    about = {
        "model": args.model, "weights": weights_fingerprint(args.model), "kind": pipe.model.config.kind,
        "parameters": pipe.model.num_parameters(), "seed": args.seed, "dtype": dtype,
        "threads": torch.get_num_threads(), "commit": source_commit(),
        "extractor": extractor.fingerprint, "reference": reference.fingerprint,
        "judge": classifier_fingerprint(classifier) if classifier else "linear", "decoder": pipe.decoder.fingerprint(),
    }  # fmt: skip
    done = settings_in(args.out, {**about, "num": args.num})

    def write(name: str, samples: Samples, more: dict[str, object]) -> None:
        record = {"setting": name, **more, **judges(samples)}
        print(json.dumps(record), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(record | about) + "\n")

    train, labels, _ = read_images(args.train_data, "train", height, width, None)
    real = None
    if args.teacher_forced:
        those = one_of_each(labels, args.num, pipe.model.config.num_classes)
        real = train[those], labels[those]
    order = chosen(len(train), args.num)
    train, labels = train[order], labels[order]
    if "floor" not in done:
        write("floor", Samples(train, labels), {})
    if "reconstruction" not in done:
        write("reconstruction", replace(reconstruct(pipe, train), labels=labels), {})
    for text, wanted in settings.items():
        for forced in (False, True) if args.teacher_forced and len(pipe.model.plan) > 1 else (False,):
            name = text + (" teacher-forced" if forced else "")
            if name in done:
                continue
            samples, seconds = draw(pipe, wanted, args.num, real if forced else None, args.seed)
            cost = {"seconds_per_image": seconds / args.num, "flops": sampling_flops(pipe, wanted)}
            write(name, samples, {"sampling": wanted.to_json(), **cost})


def settings_in(out: Path, now: dict[str, object]) -> set[str]:
    """The settings that a file of lines holds; ValueError where they are of something else than ``now``."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for line in lines:
        if other := differences({k: line[k] for k in _SAME if k in line}, {k: now[k] for k in _SAME if k in line}):
            raise ValueError(f"--out {out}: holds {line['setting']} of something else ({other}); choose another")
    return {line["setting"] for line in lines}


if __name__ == "__main__":
    main()
