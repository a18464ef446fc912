"""ADM's reference files: spatial features for sFID, and images for precision and recall by its rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ecar.evaluation import reference
from ecar.evaluation.extractors import InceptionExtractor, spatial_features
from ecar.evaluation.figures import measure
from ecar.evaluation.metrics import Gaussian
from ecar.evaluation.reference import read_statistics, with_neighbours
from ecar.evaluation.samples import Samples


class Network(nn.Module):
    """Stands for torch-fidelity's Inception: pooled features of 5 numbers, 3 classes, 2 x 2 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        small = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)
        found = self.Mixed_6d.branch1x1(small)
        return found.mean((2, 3))[:, :5], found.mean((2, 3))[:, 5:8]


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> InceptionExtractor:
    torch.manual_seed(0)
    made = InceptionExtractor.__new__(InceptionExtractor)
    made.device, made.network, made.fingerprint = "cpu", Network().requires_grad_(False), "x"
    made.num_features = 5  # type: ignore[misc]
    monkeypatch.setattr(reference, "SPATIAL_FEATURES", 28)
    return made


def pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)


def adm_file(path: Path, images: Tensor, extractor: InceptionExtractor, **other: np.ndarray) -> Path:
    """As ADM's evaluator computes it: channels last."""
    pooled = Gaussian.of(extractor(images)[0])
    maps = extractor.network.Mixed_6d.branch1x1(nn.functional.adaptive_avg_pool2d(images.float() / 255, 2))
    spatial = Gaussian.of(maps.permute(0, 2, 3, 1)[..., :7].reshape(len(images), -1))
    arrays = {
        "mu": pooled.mean.numpy(), "sigma": pooled.covariance.numpy(), "mu_s": spatial.mean.numpy(),
        "sigma_s": spatial.covariance.numpy(), "arr_0": images.permute(0, 2, 3, 1).numpy(), **other,
    }  # fmt: skip
    np.savez(path, **arrays)
    return path


def test_the_figures_of_adm_are_there_and_perfect_for_its_own_images(
    extractor: InceptionExtractor, tmp_path: Path
) -> None:
    real, fake = pictures(40, 0), pictures(30, 1) // 4
    found = read_statistics(adm_file(tmp_path / "ref.npz", real, extractor), extractor)
    against = with_neighbours(found, extractor, tmp_path)
    same, other = (measure(Samples(images, None), against, extractor) for images in (real, fake))
    assert same["FID"] == pytest.approx(0, abs=1e-3) and same["sFID"] == pytest.approx(0, abs=1e-3)
    assert other["FID"] > 0.01 and other["sFID"] > 0.01  # type: ignore[operator]
    assert same["precision (inception, k = 3, 40 against 40)"] == same["recall (inception, k = 3, 40 against 40)"] == 1
    assert other["precision (inception, k = 3, 30 against 40)"] == 0 and "IS" in other
    assert not any(key.startswith(("KID", "density")) for key in other)  # the images are those that a model trained on


def test_spatial_features_are_kept_only_while_asked_for(extractor: InceptionExtractor) -> None:
    with spatial_features(extractor) as kept:
        extractor(pictures(3, 0))
    extractor(pictures(3, 0))
    assert [tuple(part.shape) for part in kept] == [(3, 28)]


def test_parts_of_a_file_that_cannot_be_are_named(extractor: InceptionExtractor, tmp_path: Path) -> None:
    wrong = {
        "sigma_s is no covariance": {"sigma_s": -np.eye(28)},
        "mu_s has 5 numbers, expected 28": {"mu_s": np.zeros(5), "sigma_s": np.eye(5)},
        "arr_0 has 3 images": {"arr_0": np.zeros((3, 4, 4, 3), np.uint8)},
        "arr_0 is": {"arr_0": np.zeros((30, 3, 4, 4), np.uint8)},
    }
    for word, arrays in wrong.items():
        path = adm_file(tmp_path / "ref.npz", pictures(40, 0), extractor, **arrays)
        with pytest.raises(ValueError, match=word):
            read_statistics(path, extractor)
