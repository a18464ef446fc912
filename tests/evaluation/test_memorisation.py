"""Copies of training images are found, mirrored ones too, and images that are new are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.cli.main import main
from ecar.evaluation.memorisation import closeness, gate, memorisation
from ecar.evaluation.metrics import nearest_distance, nearest_rows


class Pooled:
    """4 x 4 means of each colour: features of pixels, which change when an image is mirrored."""

    name, fingerprint, num_features = "pooled", "0", 48

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1), None


def pictures(count: int, seed: int) -> torch.Tensor:
    """Smooth noise, (count, 3, 16, 16) uint8."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=16, mode="bilinear") * 255).byte()


TRAIN, HELD_OUT = pictures(400, 0), pictures(300, 1)


def judged(samples: torch.Tensor) -> dict[str, object]:
    extractor = Pooled()
    sides = ((images, extractor(images)[0]) for images in (samples, HELD_OUT, TRAIN))
    return memorisation(*sides, extractor)[0]  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_are_found_mirrored_or_not(mirrored: bool) -> None:
    """140 mirrored training images passed as new."""
    samples = TRAIN[100:240].flip(-1) if mirrored else TRAIN[100:240]
    record = judged(samples)
    assert record["share_of_samples"] == 1 and record["more_than_held_out"] is True
    assert 0.01 <= record["share_of_held_out"] <= 0.02  # type: ignore[operator]
    closest = record["closest"]
    assert isinstance(closest, list) and all(pair["mirrored"] is mirrored for pair in closest)
    assert all(pair["training_image"] == pair["sample"] + 100 and pair["distance"] == 0 for pair in closest)


def test_copies_with_some_noise_are_found() -> None:
    noise = torch.randint(-8, 9, TRAIN[:100].shape, generator=torch.Generator().manual_seed(3))
    record = judged((TRAIN[:100].int() + noise).clamp(0, 255).byte())
    assert record["share_of_samples"] == 1 and record["more_than_held_out"] is True


def test_new_images_and_the_held_out_ones_themselves_are_about_the_nominal_share() -> None:
    for samples in (HELD_OUT, pictures(1000, 2)):
        record = judged(samples)
        assert 0 < record["share_of_samples"] < 0.035 and record["more_than_held_out"] is False  # type: ignore[operator]


def test_one_copy_in_twenty_is_more_than_held_out_images_have() -> None:
    samples = torch.cat([pictures(950, 2), TRAIN[:50].flip(-1)])
    record = judged(samples)
    assert 0.05 <= record["share_of_samples"] < 0.08 and record["more_than_held_out"] is True  # type: ignore[operator]
    assert {pair["sample"] for pair in record["closest"]} <= set(range(950, 1000))  # type: ignore[attr-defined]


def test_held_out_images_that_are_training_images_show_in_their_share_and_hide_no_copies() -> None:
    """Rounding of features must not decide between two copies."""
    held_out = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 1
    held_out[:20] = 1e-6 * torch.arange(20)
    found = gate(torch.full((50,), 9e-5), held_out)
    assert found.share == 1 and found.held_out_share == 0.1 and found.threshold == 0 and found.excess
    assert not gate(held_out, held_out).excess
    with pytest.raises(ValueError, match="0 samples"):
        gate(held_out[:0], held_out)


def test_the_nearest_row_is_that_of_the_whole_table_of_distances_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, reference = (torch.randn(n, 7, generator=generator) + 1000 for n in (53, 91))
    expected = torch.cdist(rows.double(), reference.double()).min(1)
    for numbers in (7, 70, 2**20):
        monkeypatch.setattr("ecar.evaluation.metrics._NUMBERS", numbers)
        distances, places = nearest_rows(rows, reference)
        assert torch.equal(places, expected.indices)
        assert torch.allclose(distances.double(), expected.values, rtol=1e-5)


def test_memory_of_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 256x256 the thousand samples alone took 0.8 GB, and each part of the training images 4 GB."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    features = torch.zeros(9000, 8)
    with Watch():
        nearest_rows(features[:1200], features)
    assert 2**20 < largest < 40e6
    largest, images = 0, torch.zeros(64, 3 * 64 * 64, dtype=torch.uint8)
    monkeypatch.setattr("ecar.evaluation.metrics._NUMBERS", 2**17)
    with Watch():
        nearest_rows(images, images)
    assert 2**18 < largest <= 16 * 2**17


def test_the_nearest_training_image_may_be_mirrored() -> None:
    assert nearest_distance(TRAIN[:9].flip(-1), TRAIN).tolist() == [0.0] * 9
    moved = (TRAIN[:9].flip(-1).int() + 3).clamp(0, 255).byte()
    assert 0 < float(nearest_distance(moved, TRAIN).max()) <= 3.001 / 255


def test_closeness_says_which_training_image_it_is() -> None:
    extractor = Pooled()
    images = torch.stack([TRAIN[7], TRAIN[9].flip(-1)])
    found = closeness(images, extractor(images)[0], extractor(TRAIN)[0], extractor)  # type: ignore[arg-type]
    assert found.rows.tolist() == [7, 9] and found.mirrored.tolist() == [False, True]


def test_evaluate_reports_copies_with_a_picture_of_the_closest_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, images in (("train", TRAIN[:12]), ("test", HELD_OUT[:12]), ("copies", TRAIN[4:12].flip(-1))):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    command = ["evaluate", "--samples", str(tmp_path / "copies"), "--data", str(tmp_path / "test"), "--allow-small"]
    command += ["--train-data", str(tmp_path / "train"), "--num", "8", "--cache", str(tmp_path / "cache")]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "eval.json")]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    pixels = record["nearest training image, mirrored or not (RMS of pixels in [0, 1], of 8)"]
    assert pixels["samples"] == {"median": 0, "min": 0} and pixels["reference"]["min"] > 0.01
    found = record["memorisation (efficientnet-lite0)"]
    assert found["share_of_samples"] == 1 and found["share_of_held_out"] < 0.1 and found["more_than_held_out"]
    assert found["picture"] == str(tmp_path / "eval.closest.png")
    sheet = np.asarray(Image.open(found["picture"]))[1::3, 1::3]  # three times enlarged
    assert sheet.shape == (2 * 18, 4 * 34, 3)
    first = found["closest"][0]
    assert np.array_equal(sheet[1:17, 17:33], TRAIN[first["training_image"]].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[1:17, 1:17], sheet[1:17, 17:33][:, ::-1])
