"""Fitting a critic: logistic regression between features of real images and of a model's samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_DIRECTIONS = 256  # of the features, those in which real images vary most
_CLASS_DIRECTIONS = 32  # of these at most, those whose weight depends on the class
_CLASS_WEIGHTS = 320  # of all classes together: of a thousand classes none has the examples for weights of its own
_RIDGE = 1e-2
_QUANTILES = 64
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Fit:
    """Tensors of a ``Critic``, and the share of held-out images, half of them real, that it tells rightly."""

    tensors: dict[str, Tensor]
    accuracy: float


def fit_critic(
    real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor, num_classes: int, *, seed: int = 0
) -> Fit:
    """Fit to features.

    Args:
        real: (N, D) of real images.
        real_labels: (N,) class ids; not read where ``num_classes`` is 0.
        fake: (M, D) of the model's samples, in the same shares of classes.
        fake_labels: (M,).
        num_classes: K.
        seed: of the choice of held-out images.

    Raises:
        ValueError: fewer than 50 images on a side, or features that are not finite.
    """
    if min(len(real), len(fake)) < 50:
        raise ValueError(f"a critic needs 50 images a side at least, got {len(real)} real and {len(fake)} samples")
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise ValueError("features are not finite; are the images all right?")
    mean, basis = _whitening(real)
    some = min(_CLASS_DIRECTIONS, _CLASS_WEIGHTS // num_classes, basis.shape[1]) if num_classes else 0

    def inputs(features: Tensor, labels: Tensor) -> Tensor:
        x = (features - mean) @ basis
        if not some:
            return x
        each = x[:, None, :some] * F.one_hot(labels, num_classes).to(x)[:, :, None]  # (N, K, Q)
        return torch.cat([x, each.flatten(1)], 1)

    generator = torch.Generator().manual_seed(seed)
    sides = []
    for features, labels in ((real, real_labels), (fake, fake_labels)):
        rows = torch.randperm(len(features), generator=generator)
        held = max(1, int(_HELD_OUT * len(rows)))
        x = inputs(features, labels)
        sides.append((x[rows[held:]], x[rows[:held]]))
    (real_x, real_held), (fake_x, fake_held) = sides
    weights = _logistic(real_x, fake_x)
    tensors = _unwhitened(weights, mean, basis, num_classes if some else 0)
    tensors["quantiles"] = _quantiles(tensors, fake, fake_labels)
    right = [(real_held @ weights[:-1] + weights[-1] > 0), (fake_held @ weights[:-1] + weights[-1] < 0)]
    return Fit(
        tensors,
        float(torch.stack([r.float().mean() for r in right]).mean()),
    )


def _unwhitened(theta: Tensor, mean: Tensor, basis: Tensor, classes: int) -> dict[str, Tensor]:
    """The coefficients as ``weight`` (classes + 1, D) and ``bias`` (classes + 1,) of the features themselves."""
    count = basis.shape[1]
    weight = (basis @ theta[:count])[None]
    if classes:
        own = theta[count:-1].view(classes, -1)
        weight = torch.cat([weight + own @ basis[:, : own.shape[1]].T, weight])
    return {"weight": weight, "bias": theta[-1] - weight @ mean}


def _quantiles(tensors: dict[str, Tensor], fake: Tensor, labels: Tensor) -> Tensor:
    """Scores of the samples, evenly spread over their distribution, by class and, last, of all: (R, Q)."""
    scores = fake @ tensors["weight"].T + tensors["bias"]  # (M, R)
    places = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES
    rows = len(tensors["bias"])
    own = [scores[labels == row, row] if row < rows - 1 else scores[:, row] for row in range(rows)]
    return torch.stack([torch.quantile(s if len(s) else scores[:, r], places) for r, s in enumerate(own)])


def _whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,), and directions of largest variance first, scaled to variance 1 (D, P)."""
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(features.double().T))
    count = min(_DIRECTIONS, len(features) // 4, int((values > 1e-6 * values.max()).sum()))
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    return mean, (vectors / values.sqrt()).to(features)


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    """Ridge logistic regression, both sides of one weight: coefficients and, last, the constant."""
    x = torch.cat([real, fake])
    sign = torch.cat([torch.ones(len(real)), -torch.ones(len(fake))])
    weight = torch.cat([torch.full((len(real),), 0.5 / len(real)), torch.full((len(fake),), 0.5 / len(fake))])
    theta = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        margin = sign * (x @ theta[:-1] + theta[-1])
        loss = (weight * F.softplus(-margin)).sum() + _RIDGE / 2 * theta[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return theta.detach()
