"""A linear judge of classes, on features of a frozen network: seconds, where a classifier from scratch takes hours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar.evaluation.extractors import Extractor, extract
from ecar.evaluation.reference import Reference
from ecar.evaluation.samples import Samples

_RIDGE = 0.1  # as a share of the images


def linear_classifier(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Features (N, D) -> class ids (N,), by ridge regression of the classes on standardised features."""
    mean, std = features.double().mean(0), features.double().std(0).clamp_min(1e-6)

    def inputs(features: Tensor) -> Tensor:
        return torch.cat([(features.double() - mean) / std, torch.ones(len(features), 1, dtype=torch.float64)], 1)

    x, y = inputs(features), F.one_hot(labels, classes).double()
    ridge = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    return lambda features: (inputs(features) @ weights).argmax(1)


def recognised(
    samples: Samples, reference: Reference, features: Tensor | None, labels: Tensor, extractor: Extractor
) -> dict[str, object]:
    """The share of samples, and of the reference, that a linear regression takes for the class they have. It is made of
    ``features`` (N, D) and ``labels`` (N,) of the training images, and judges with the network of the distances.
    Nothing without two classes, or labels on every side."""
    classes = int(labels.max()) + 1
    if samples.labels is None or reference.labels is None or reference.features is None or features is None:
        return {}
    if classes < 2:
        return {}
    classify = linear_classifier(features, labels, classes)
    found = {
        "samples": (classify(extract(extractor, samples.images)[0]) == samples.labels).double().mean(),
        "reference": (classify(reference.features) == reference.labels).double().mean(),
    }
    name = f"right class, by linear regression on training images ({extractor.name})"
    return {name: {side: round(float(share), 4) for side, share in found.items()}}
