"""Distances and scores between sets of features. Float64; (N, D) tensors on one device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEIGHBOURS = 5  # k of precision, recall, density and coverage
ADM_NEIGHBOURS = 3  # k of precision and recall as ADM's evaluator has them
_NUMBERS = 2**23  # of a set of rows that are compared at once: 32 MB


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64, of features; all that the Frechet distance needs.

    Attributes:
        root: of fewer features than numbers (N, D) with root^T root = covariance, from which it is found much sooner.
    """

    mean: Tensor
    covariance: Tensor
    root: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Mean and unbiased covariance of features (N, D).

        Raises:
            ValueError: fewer than two rows, or values that are not finite.
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
        x = features.double()
        if not torch.isfinite(x).all():
            raise ValueError("features are not finite; are the images all right?")
        few = len(x) < x.shape[1]
        return cls(x.mean(0), torch.cov(x.T), (x - x.mean(0)) / (len(x) - 1) ** 0.5 if few else None)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (1706.08500), the root's trace from eigenvalues: of few
    features R with R^T R = S_a, those of R S_b R^T, which has no others but zeros.

    Raises:
        ValueError: different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared")
    roots = [(len(one.root), one.root, other.covariance) for one, other in ((a, b), (b, a)) if one.root is not None]
    if roots:
        _, root, covariance = min(roots, key=lambda one: one[0])
        cross = torch.linalg.eigvalsh(root @ covariance @ root.T).clamp_min(0).sqrt().sum()
    else:
        cross = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    trace = a.covariance.trace() + b.covariance.trace()
    distance = float((a.mean - b.mean).square().sum() + trace - 2 * cross)
    return max(0.0, distance)  # of equal sets the rounding may leave less than nothing


def kernel_distance(real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000) -> tuple[float, float]:
    """KID (1801.01401): mean and standard deviation over subsets of the unbiased MMD with a cubic kernel.

    torchmetrics draws the subsets from the global generator: it is forked and seeded here. It would also gather
    features from all processes, which may have left.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(real), len(fake))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            feature=nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def chosen(count: int, limit: int) -> Tensor:
    """``limit`` of ``count`` rows, always the same ones, in random order: files are sorted by class, so that a prefix
    of them is no sample."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) | p(y)) (1606.03498): mean and standard deviation over splits of the images in random order."""
    scores = []
    probabilities = probabilities[chosen(len(probabilities), len(probabilities))]
    for part in probabilities.double().clamp_min(1e-16).tensor_split(min(splits, len(probabilities))):
        marginal = part.mean(0, keepdim=True)
        scores.append((part * (part.log() - marginal.log())).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def neighbour_scores(real: Tensor, fake: Tensor, *, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (1904.06991), density and coverage (2002.09797), by k nearest neighbours.

    With B(x) the ball around x that reaches its k-th nearest neighbour in its own set:
    precision is the share of fake in any real ball, recall the share of real in any fake ball, density the number
    of real balls around a fake one divided by k, coverage the share of real balls that hold a fake one.

    Raises:
        ValueError: a set of no more than ``neighbours`` images.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} images on either side")
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = _radius(real, neighbours), _radius(fake, neighbours)
    hits, near_fake = torch.zeros(len(fake), dtype=torch.float64), torch.full((len(real),), torch.inf)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for first in range(0, len(fake), 1000):
        rows = slice(first, first + 1000)
        distance = torch.cdist(fake[rows], real)  # (rows, N_real)
        hits[rows] = (distance <= real_radius).sum(1).double()
        near_fake = torch.minimum(near_fake, distance.min(0).values)
        recalled |= (distance <= fake_radius[rows, None]).any(0)
    return {
        "precision": float((hits > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(hits.mean() / neighbours),
        "coverage": float((near_fake <= real_radius).double().mean()),
    }


def _radius(x: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th nearest other row; the row itself is the smallest of k + 1."""
    parts = [torch.cdist(p, x).kthvalue(neighbours + 1, dim=1).values for p in x.split(1000)]
    return torch.cat(parts)


def nearest_distance(images: Tensor, reference: Tensor) -> Tensor:
    """RMS difference (N,) of images (N, 3, H, W) uint8, scaled to [0, 1], to the closest one in ``reference`` or to its
    mirror image: training mirrors images, and what it has learnt by heart may come out either way."""
    known = reference.flatten(1)
    plain, mirrored = (nearest_rows(x.flatten(1), known)[0] for x in (images, images.flip(-1)))
    return torch.minimum(plain, mirrored) / (255 * known.shape[1] ** 0.5)


def nearest_rows(rows: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The closest row of ``reference`` (M, D) to each of ``rows`` (N, D): Euclidean distance (N,) float32, and its
    place (N,) int64. Numbers of any type; beside the two sets it takes some 500 MB, however large they are."""
    at_once = max(1, min(8192, _NUMBERS // reference.shape[1]))
    centre = reference[:at_once].float().mean(0)  # products of what is left round less
    # More rows than that on this side: for each part of them all of the reference is converted once more.
    found = [_nearest_rows(part, reference, centre, at_once) for part in rows.split(min(1024, 4 * at_once))]
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def _nearest_rows(rows: Tensor, reference: Tensor, centre: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    a = rows.float() - centre
    best, nearest = torch.full((len(a),), torch.inf), torch.zeros(len(a), dtype=torch.int64)
    for number, part in enumerate(reference.split(at_once)):
        b = part.float() - centre
        distance, row = torch.addmm(torch.linalg.vector_norm(b, dim=1).square(), a, b.T, alpha=-2).min(1)
        closer = distance < best
        best, nearest = torch.where(closer, distance, best), torch.where(closer, row + at_once * number, nearest)
    # Which one is nearest the products tell; how far it is they do not: of equal rows they leave a rest.
    differences = rows.float() - reference[nearest].float()
    return differences.square().sum(1, dtype=torch.float64).sqrt().float(), nearest
