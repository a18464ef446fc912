"""Closed forms, and two ways: ours = torchmetrics = brute force."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ecar.evaluation.figures import measure
from ecar.evaluation.metrics import (
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distance,
    neighbour_scores,
)
from ecar.evaluation.reference import reference_from_images
from ecar.evaluation.samples import Samples, choose


def normal(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a = Gaussian(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 1.0])).double())
    b = Gaussian(torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 9.0])).double())
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 3) ** 2)


@pytest.mark.parametrize("counts", [(9, 7), (9, 60)])
def test_few_features_have_the_distance_of_their_covariances(counts: tuple[int, int]) -> None:
    """The eigenvalues of a 1280x1280 product took 13 seconds for 24 pictures."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=generator)
    a, b = (Gaussian.of(torch.randn(count, 40, generator=generator) @ mix + count) for count in counts)
    whole = frechet_distance(dataclasses.replace(a, root=None), dataclasses.replace(b, root=None))
    assert a.root is not None and frechet_distance(a, b) == pytest.approx(whole, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(whole, rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Identity):
        num_features = 6

    real, fake = normal(300, 6, 0) * 2 + 1, normal(200, 6, 1)
    metric = FrechetInceptionDistance(feature=Identity(), input_img_size=(6,))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert frechet_distance(Gaussian.of(real), Gaussian.of(fake)) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_singular_covariances_give_a_finite_distance() -> None:
    """Fewer images than features: the usual matrix square root fails or turns complex."""
    a, b = Gaussian.of(normal(10, 50, 0)), Gaussian.of(normal(10, 50, 1))
    assert math.isfinite(frechet_distance(a, b)) and frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_is_the_unbiased_mmd_by_hand_and_leaves_the_global_generator_alone() -> None:
    x, y = normal(40, 5, 0).double(), (normal(40, 5, 1) + 0.3).double()
    before = torch.random.get_rng_state()
    mean, _ = kernel_distance(x, y, subsets=3, subset_size=1000)
    assert torch.equal(before, torch.random.get_rng_state())

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 5 + 1) ** 3

    within = [(kernel(a, a).sum() - kernel(a, a).trace()) / (40 * 39) for a in (x, y)]
    assert mean == pytest.approx(float(within[0] + within[1] - 2 * kernel(x, y).mean()), rel=1e-6)


def test_inception_score_is_the_number_of_classes_when_sure_and_balanced_and_one_when_unsure() -> None:
    sure = torch.eye(4).repeat(25, 1)
    assert inception_score(sure, splits=1)[0] == pytest.approx(4)
    assert inception_score(torch.full((100, 4), 0.25))[0] == pytest.approx(1)
    assert inception_score(sure[:91], splits=10)[0] > 3  # ten of nine or ten, not nine of ten and one of one


def test_neighbour_scores_are_those_of_the_definition() -> None:
    real, fake, k = normal(60, 3, 0), normal(50, 3, 1) * 1.5, 3

    def radius(x: torch.Tensor, i: int) -> float:
        return float(sorted((x[i] - x[j]).norm() for j in range(len(x)) if j != i)[k - 1])

    radii, fake_radii = [radius(real, i) for i in range(60)], [radius(fake, i) for i in range(50)]
    inside = [[float((f - r).norm()) <= radii[i] for i, r in enumerate(real)] for f in fake]
    recall = [any(float((r - f).norm()) <= fake_radii[j] for j, f in enumerate(fake)) for r in real]
    found = neighbour_scores(real, fake, neighbours=k)
    assert found["precision"] == pytest.approx(sum(map(any, inside)) / 50)
    assert found["recall"] == pytest.approx(sum(recall) / 60)
    assert found["density"] == pytest.approx(sum(map(sum, inside)) / (50 * k))
    assert found["coverage"] == pytest.approx(sum(any(row[i] for row in inside) for i in range(60)) / 60)


def test_identical_sets_have_full_precision_recall_and_coverage() -> None:
    x = normal(30, 4, 0)
    found = neighbour_scores(x, x)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


class Corner:
    """An extractor whose features are the first two pixels."""

    name, fingerprint, num_features = "efficientnet-lite0", "", 2

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = images[:, 0, 0, :2].float()
        return features, torch.nn.functional.one_hot(images[:, 1, 0, 0].long(), 10).float()


def test_files_sorted_by_class_score_as_shuffled_ones(tmp_path: Path) -> None:
    """A prefix of the reference was compared with all samples: the first classes only, in an image folder."""
    generator, classes = torch.Generator().manual_seed(1), torch.arange(10).repeat_interleave(60)
    images = torch.zeros(600, 3, 1, 2, dtype=torch.uint8)
    images[:, 0, 0] = (20 * classes[:, None] + torch.randint(0, 12, (600, 2), generator=generator)).byte()
    images[:, 1] = classes.view(-1, 1, 1).byte()
    reference = reference_from_images("sorted", images, classes, tuple("abcdefghij"), Corner(), tmp_path)
    samples = Samples(images[::6], classes[::6])
    record = measure(samples, reference, Corner())
    assert record["precision (efficientnet-lite0, 100 a side)"] > 0.8  # type: ignore[operator]
    assert record["coverage (efficientnet-lite0, 100 a side)"] > 0.8  # type: ignore[operator]
    assert record["IS"] > 5  # type: ignore[operator]  # in splits of one class each it would be 1
    few = choose(Samples(images, classes), 100)
    assert few.labels is not None and len(set(few.labels.tolist())) == 10


def test_too_few_images_for_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 5"):
        neighbour_scores(normal(5, 3, 0), normal(9, 3, 0))


def test_the_distance_of_equal_sets_is_zero_and_has_no_sign() -> None:
    """-0.0 was printed."""
    for seed in range(20):
        same = Gaussian.of(normal(30, 8, seed))
        found = frechet_distance(same, same)
        assert 0 <= found < 1e-6 and not str(round(found, 4)).startswith("-")


def test_nearest_distance_finds_the_copy() -> None:
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = images[:2].clone()
    changed[1] = (changed[1].int() - 51).clamp_min(0).byte()
    found = nearest_distance(changed, images)
    assert float(found[0]) == 0 and 0 < float(found[1]) <= 0.2 + 1e-6


def test_nearest_distance_of_an_image_to_itself_is_zero_however_bright_and_large() -> None:
    """The rest of a difference of large float32 sums was up to 0.01."""
    images = torch.randint(200, 256, (3, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert nearest_distance(images, images).tolist() == [0, 0, 0]


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Gaussian.of(torch.full((3, 2), torch.nan))


def test_covariance_of_features_far_from_zero_is_that_of_float64() -> None:
    """In float32 the mean's rounding is a part of the covariance as large as itself."""
    generator = torch.Generator().manual_seed(0)
    x = 4096 + torch.randint(-4, 5, (500, 3), generator=generator) / 1024  # exact in float32
    found = Gaussian.of(x)
    assert found.covariance.dtype == torch.float64
    assert np.allclose(found.covariance.numpy(), np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-15)
