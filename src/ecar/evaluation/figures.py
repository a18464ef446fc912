"""Samples and reference -> one record of named figures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ecar.config import ModelConfig, same_names
from ecar.evaluation.classifier import Classifier, accuracy, predict
from ecar.evaluation.extractors import DISTANCE_NAMES, Extractor, extract, spatial_features
from ecar.evaluation.metrics import (
    ADM_NEIGHBOURS,
    NEIGHBOURS,
    Gaussian,
    chosen,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbour_scores,
)
from ecar.evaluation.reference import Reference
from ecar.evaluation.samples import Samples

_NEIGHBOUR_IMAGES = 10_000


def check_count(num: int, extractor: Extractor, allow_small: bool, what: str = "`num`") -> None:
    """ValueError for too few images of either side: below the number of features a covariance is singular, and the
    Frechet distance is mostly bias. ``allow_small`` accepts it, and the record says so."""
    if num < 2:
        raise ValueError(f"{what} must be at least 2, got {num}")
    if num <= extractor.num_features and not allow_small:
        raise ValueError(
            f"{what} {num} is no more than the {extractor.num_features} features of {extractor.name}: the Frechet "
            "distance would be mostly bias; take more images, or say `allow_small` (KID has no such bias)"
        )


class Seen(NamedTuple):
    """What an extractor gives of images: features (N, D), and where it has them class probabilities (N, K) and the
    spatial features of sFID."""

    features: Tensor
    probabilities: Tensor | None = None
    spatial: Tensor | None = None


def look(images: Tensor, extractor: Extractor, *, spatial: bool = False) -> Seen:
    """Features of images (N, 3, H, W) uint8; ``spatial``: of an Inception extractor those of sFID too."""
    with spatial_features(extractor) if spatial else nullcontext() as found:
        features, probabilities = extract(extractor, images)
    return Seen(features, probabilities, None if found is None else torch.cat(found))


def measure(samples: Samples, reference: Reference, extractor: Extractor) -> dict[str, object]:
    """Every figure that extractor and reference allow; keys say extractor and N."""
    seen = look(samples.images, extractor, spatial=reference.spatial is not None)
    return figures(seen, reference, extractor)


def figures(seen: Seen, reference: Reference, extractor: Extractor) -> dict[str, object]:
    """``measure`` of samples whose features are known."""
    features, suffix = seen.features, extractor.name
    count, distance = len(features), DISTANCE_NAMES.get(suffix, f"FD-{suffix}")
    record: dict[str, object] = {
        distance: round(frechet_distance(Gaussian.of(features), reference.gaussian), 4),
        "num": count,
        "against": f"{reference.count} real" if reference.count else "given statistics",
        "biased_small_sample": min(count, reference.count or count) <= extractor.num_features,
    }
    if reference.features is not None:
        mean, std = kernel_distance(reference.features, features)
        record[f"KID x 1000 ({suffix})"] = round(1000 * mean, 4) + 0.0  # not -0.0
        record[f"KID x 1000 std over subsets ({suffix})"] = round(1000 * std, 4)
        limit = min(_NEIGHBOUR_IMAGES, count, len(reference.features))
        if limit > NEIGHBOURS:
            real, fake = (x[chosen(len(x), limit)] for x in (reference.features, features))
            scores = neighbour_scores(real, fake)
            record |= {f"{name} ({suffix}, {limit} a side)": round(value, 4) for name, value in scores.items()}
    if reference.spatial is not None and seen.spatial is not None:
        record["sFID"] = round(frechet_distance(Gaussian.of(seen.spatial), reference.spatial), 4)
    if reference.neighbours is not None:
        record |= _adm_scores(reference.neighbours, features, suffix)
    if seen.probabilities is not None:
        score, spread = inception_score(seen.probabilities)
        record |= {"IS": round(score, 4), "IS std over splits": round(spread, 4)}
    return record


def _adm_scores(real: Tensor, fake: Tensor, suffix: str) -> dict[str, object]:
    """Precision and recall by the rule of ADM's evaluator: 3 neighbours, every image of both sides."""
    if len(fake) <= ADM_NEIGHBOURS:
        return {}
    scores = neighbour_scores(real, fake, neighbours=ADM_NEIGHBOURS)
    of = f"{suffix}, k = {ADM_NEIGHBOURS}, {len(fake)} against {len(real)}"
    return {f"{name} ({of})": round(scores[name], 4) for name in ("precision", "recall")}


def check_classes(model: ModelConfig, data: str, names: tuple[str, ...]) -> None:
    """Class ids of the model and of ``data``, whose classes have these names, mean the same. Cheap.

    Raises:
        ValueError: a model without classes, or with another number of them; both have names (not just the ids), and
            not the same in the same order.
    """
    ours = model.class_names
    if model.num_classes == 0:
        raise ValueError("the model has no classes to be recognised: it was trained without labels")
    if model.num_classes != len(names):
        raise ValueError(f"the model has {model.num_classes} classes, {data} has {len(names)}")
    ids = tuple(str(number) for number in range(len(names)))
    if ids in (ours, names) or not ours:
        return
    if not same_names(ours, names):
        raise ValueError(
            f"{data} has the classes {', '.join(names[:5])}, ..., the model {', '.join(ours[:5])}, ...: "
            "not the same in the same order; rename or reorder them"
        )


def check_labels(data: str, names: tuple[str, ...], samples: Samples | None = None) -> None:
    """What a classifier's figures need of ``data``, whose classes have these names. Cheap.

    Raises:
        ValueError: a reference that is no labelled data set; samples without labels, or with labels that it does not
            have.
    """
    if not names:
        raise ValueError(f"classifier accuracy needs a labelled data set as `data`; {data} has no classes")
    if samples is None:
        return
    if samples.class_names and not same_names(samples.class_names, names):
        raise ValueError(
            f"the folders of the samples are the classes {', '.join(samples.class_names[:5])}, ..., {data} has "
            f"{', '.join(names[:5])}, ...: not the same in the same order; name them alike"
        )
    if samples.labels is None:
        raise ValueError("classifier accuracy needs to know which class was asked for: the samples have no labels")
    if int(samples.labels.min()) < 0 or int(samples.labels.max()) >= len(names):
        raise ValueError(f"the samples have labels outside the {len(names)} classes of the reference")


class Recognition:
    """A classifier's figures about samples, beside its figures about the real images; ``check_labels`` comes before."""

    def __init__(self, classifier: Classifier, reference: Reference) -> None:
        assert reference.images is not None and reference.labels is not None
        self.classifier, self.reference, self.names = classifier, reference, reference.class_names
        found, features = predict(classifier, reference.images)
        self.real, self.real_accuracy = Gaussian.of(features), accuracy(found, reference.labels, len(self.names))[0]

    def __call__(self, samples: Samples) -> dict[str, object]:
        """Share of samples recognised as the class asked for, and the Frechet distance of the classifier's features."""
        assert samples.labels is not None
        found, features = predict(self.classifier, samples.images)
        overall, each = accuracy(found, samples.labels, len(self.names))
        per_class = {n: None if a is None else round(a, 4) for n, a in zip(self.names, each, strict=True)}
        return {
            "classifier_accuracy": round(overall, 4),
            "classifier_accuracy_per_class": per_class,
            "classifier_accuracy_on_real": round(self.real_accuracy, 4),
            "FD-classifier": round(frechet_distance(Gaussian.of(features), self.real), 4),
        }
