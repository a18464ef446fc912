"""What choosing among candidates is worth, of any model: quality and cost for several numbers of candidates.

    python benchmarks/candidates.py --model MODEL --setting 25:2:ab2:0.4 --data test.parquet \\
        --train-data train.parquet --classifier judge.safetensors --out candidates.jsonl

Samples are drawn once. Each half is judged by a critic that was fitted to the other half, so that no critic scores a
sample it has seen. Images are then chosen among 1, 2 and 4 of them, --repeats times at random, and figures are means
over these: every number of candidates is measured on as many images of the same samples. With --acceptance also one
after the other until one is accepted, among --most. A setting is that of curve.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from curve import draw, parse_setting
from ecar import Pipeline
from ecar.cli.options import torch_dtype, usable_dtype
from ecar.cost.flops import flops_of, sampling_flops
from ecar.evaluation.classifier import classifier_fingerprint, load_classifier, predict
from ecar.evaluation.extractors import extract, get_extractor
from ecar.evaluation.metrics import Gaussian, frechet_distance, kernel_distance
from ecar.evaluation.reference import read_images
from ecar.files.commit import source_commit
from ecar.pretrained.folders import weights_fingerprint
from ecar.refine import accepts, choose, fit_critic, levels_of
from ecar.refine.critic import Critic, Features


def scores(
    features: Features, real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], classes: int
) -> tuple[Tensor, float]:
    """Logarithm of the ratio of each sample (N,), by the critic of the other half; and the critics' mean accuracy."""
    halves = torch.randperm(len(fake[1]), generator=torch.Generator().manual_seed(0)) % 2
    found, told = torch.zeros(len(halves)), []
    for half in (0, 1):
        theirs, ours = halves != half, halves == half
        fit = fit_critic(*real, fake[0][theirs], fake[1][theirs], classes)
        found[ours] = Critic(features, fit.tensors, {}).of_features(fake[0][ours], fake[1][ours])
        told.append(fit.accuracy)
    return found, sum(told) / 2


def groups_of(labels: Tensor, count: int, num: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Of each class samples for its share of ``num`` images, each among ``count``: rows (images, count), none twice."""
    classes = labels.unique()
    for name in classes:
        own = (labels == name).nonzero().squeeze(1)
        each = num // len(classes)
        yield own[torch.randperm(len(own), generator=generator)[: each * count]].view(each, count)


def chosen_rows(
    score: Tensor, labels: Tensor, count: int, num: int, power: float, generator: torch.Generator
) -> Tensor:
    """``num`` samples in the same shares of classes, each chosen among ``count`` of its class."""
    rows = []
    for groups in groups_of(labels, count, num, generator):
        pick = choose(score[groups], torch.rand(groups.shape, generator=generator), power)
        rows.append(groups.gather(1, pick[:, None]).squeeze(1))
    return torch.cat(rows)


def accepted_rows(
    score: Tensor, labels: Tensor, acceptance: float, most: int, num: int, power: float, generator: torch.Generator
) -> tuple[Tensor, float]:
    """The same, but the first that is accepted among ``most``; and how many were drawn for an image, on average."""
    rows, drawn = [], []
    for groups in groups_of(labels, most, num, generator):
        own = score[labels == labels[groups[0, 0]]]  # of all samples of the class
        level = levels_of(own[None], acceptance, power)
        good = accepts(score[groups], level, torch.rand(groups.shape, generator=generator), power)
        pick = choose(score[groups], torch.rand(groups.shape, generator=generator), power)  # where none is accepted
        first = torch.where(good.any(1), good.float().argmax(1), pick)
        rows.append(groups.gather(1, first[:, None]).squeeze(1))
        drawn.append(torch.where(good.any(1), first + 1, most).double())
    return torch.cat(rows), float(torch.cat(drawn).mean())


def main() -> None:
    """Draw, fit, choose, write one line per number of candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "train-data", "classifier", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--setting", default=None, help="default: the model's")
    parser.add_argument("--samples", type=int, default=8200, help="to draw")
    parser.add_argument("--num", type=int, default=2000, help="images to judge")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--acceptance", type=float, nargs="*", default=[])
    parser.add_argument("--most", type=int, default=8, help="candidates, with acceptance")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--power", type=float, default=2.0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if (most := max(*options.counts, options.most if options.acceptance else 1)) * options.num > options.samples:
        parser.error(f"{most} candidates for each of --num {options.num} images need as many --samples")
    try:
        lines = [json.dumps(line) for line in measured(options)]
    except ValueError as error:
        parser.error(str(error))
    Path(options.out).write_text("\n".join(lines) + "\n")


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each number of candidates, and for each acceptance."""
    dtype = torch_dtype(usable_dtype("bf16", "cpu"))
    plain = Pipeline.from_pretrained(options.model, device="cpu", dtype=dtype)
    pipe = Pipeline.from_pretrained(options.model, device="cpu", dtype=dtype, compile=options.compile)
    settings = parse_setting(options.setting, pipe) if options.setting else pipe.settings()
    config, extractor, features = pipe.model.config, get_extractor("efficientnet-lite0"), Features()
    test = read_images(options.data, "test", *config.image_side, None)
    train = read_images(options.train_data, "train", *config.image_side, 25_000)
    judge = load_classifier(Path(options.classifier), test.class_names)
    samples, seconds = draw(pipe, settings, options.samples)
    assert samples.labels is not None
    labels = samples.labels

    def read(images: Tensor) -> Tensor:
        return torch.cat([features(part) for part in images.split(250)])

    score, accuracy = scores(
        features, (read(train.images), train.labels), (read(samples.images), labels), config.num_classes
    )
    (real, _), (ours, _) = extract(extractor, test.images), extract(extractor, samples.images)
    (_, real_judged), (seen, judged) = predict(judge, test.images), predict(judge, samples.images)
    flops, critic = sampling_flops(plain, settings)["total"], flops_of(lambda: features(samples.images[:1]))
    about = {
        "settings": settings.to_json(), "num": options.num, "samples": options.samples, "repeats": options.repeats,
        "power": options.power, "dtype": str(dtype).removeprefix("torch."), "critic_accuracy": round(accuracy, 4),
        "weights": weights_fingerprint(options.model), "kind": config.kind, "seconds_to_draw": round(seconds, 1),
        "judge": classifier_fingerprint(judge), "commit": source_commit(),
    }  # fmt: skip

    def figures(rows: Tensor) -> tuple[float, ...]:
        """Of the chosen samples: FD, KID, FD-classifier, accuracy."""
        return (
            frechet_distance(Gaussian.of(ours[rows]), Gaussian.of(real)),
            1000 * kernel_distance(real, ours[rows])[0],
            frechet_distance(Gaussian.of(judged[rows]), Gaussian.of(real_judged)),
            float((seen[rows] == labels[rows]).float().mean()),
        )

    generator = torch.Generator().manual_seed(0)
    for count, share in [*((c, None) for c in options.counts), *((options.most, a) for a in options.acceptance)]:
        used, means = repeated(options, score, labels, count, share, generator, figures)
        cost = round(used * (flops + (critic if count > 1 else 0)))
        line = {**means, "candidates": count, "acceptance": share, "drawn": round(used, 3), "flops_per_image": cost}
        print(json.dumps(line), flush=True)
        yield {**line, **about}


def repeated(
    options: argparse.Namespace, score: Tensor, labels: Tensor, count: int, share: float | None,
    generator: torch.Generator, figures: Callable[[Tensor], tuple[float, ...]],
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Candidates drawn for an image, and figures of the chosen: means over ``--repeats`` choices at random."""
    drawn, rounds = list[float](), list[tuple[float, ...]]()
    for _ in range(options.repeats):
        if share is None:
            rows, used = chosen_rows(score, labels, count, options.num, options.power, generator), float(count)
        else:
            rows, used = accepted_rows(score, labels, share, count, options.num, options.power, generator)
        drawn.append(used)
        rounds.append(figures(rows))
    names = ("FD-EffNetLite0", "KID x 1000", "FD-classifier", "classifier_accuracy")
    means = {name: round(mean(values), 4) for name, values in zip(names, zip(*rounds, strict=True), strict=True)}
    return mean(drawn), means


if __name__ == "__main__":
    main()
