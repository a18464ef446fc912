"""What is said of edits: holes have the size they are said to have, batches draw what the pipeline draws, figures of
known pictures are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import editing
from conftest import random_dit, random_model, tiny_config
from ecar.sampling.pictures import from_pil
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import PixelTokenizer
from edits import Subject, border, box, holes, laid_in, reduced, sheet, shrunk, square_inside, strokes, to_picture


class Darker(PixelTokenizer):
    """Loses ten of 255 grey levels."""

    def decode_raw(self, latents: Tensor) -> Tensor:
        return super().decode_raw(latents) - 20 / 255


class Means:
    """An extractor: the mean of each channel."""

    name, fingerprint, num_features = "efficientnet-lite0", "means", 3

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return images.float().mean((2, 3)), None


def subject(batch: int = 3) -> Subject:
    """Five pictures of 12 x 8 pixels, and a random model of three stages."""
    pipe = Pipeline(random_model(tiny_config()), Darker(factor=1))
    images = torch.randint(40, 200, (5, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Subject(pipe, pipe.settings(), images, [0, 1, 2, 0, 1], batch)


def test_holes_cover_what_they_are_said_to_cover() -> None:
    for height, width in ((32, 32), (64, 96), (256, 256)):
        found = holes(height, width, 3)
        assert {mask.mean() for mask in found["quarter"]} == {0.25}
        assert {mask.mean() for mask in found["half"]} == {0.5} and not found["half"][0][: height // 2].any()
        for mask in found["free_form"]:
            assert mask.shape == (height, width) and 0.3 <= mask.mean() < 0.35


def test_brush_strokes_are_those_of_their_seed() -> None:
    assert np.array_equal(strokes(64, 64, 5), strokes(64, 64, 5))
    assert not np.array_equal(strokes(64, 64, 5), strokes(64, 64, 6))
    assert strokes(64, 64, 0, share=0.6).mean() >= 0.6


def test_a_seam_is_the_step_across_the_border_and_nothing_else() -> None:
    """Steps elsewhere count no more than the edge of the picture does."""
    ramp = torch.arange(48).expand(3, 32, 48).clone()  # a step of 1 between columns, of 0 between rows
    for mask in (strokes(32, 48, 1), box(32, 48, (0, 16, 48, 16))):
        inside = torch.from_numpy(mask)
        flat = torch.where(inside, 130, 100).expand(3, -1, -1)
        assert border(flat.byte(), mask) == 30
    assert border(ramp.byte(), box(32, 48, (0, 16, 48, 16))) == 0
    assert border(ramp.byte(), box(32, 48, (8, 8, 16, 8))) == pytest.approx(2 * 8 / (2 * 8 + 2 * 16))


def test_pictures_edited_in_one_batch_are_those_of_the_pipeline() -> None:
    """Each with its own mask, seed and class."""
    some = subject()
    pictures, masks = [to_picture(image) for image in some.images], holes(8, 12, 5)["free_form"]
    shown = zip(pictures, some.labels, range(5), masks, strict=True)
    alone = [some.pipe.edit(p, label=c, seeds=[s], mask=m).images[0] for p, c, s, m in shown]
    assert (some.draw(some.redrawing(masks)).int() - from_pil(alone).int()).abs().max() <= 1
    varied = some.draw(some.redrawing([None] * 5, 0.5), seed=7)
    last = some.pipe.vary(pictures[4], label=1, seeds=[11], strength=0.5).images
    assert (varied[4:].int() - from_pil(last).int()).abs().max() <= 1
    small = shrunk(some.images, 2)
    large = [some.pipe.upscale(to_picture(small[i]), label=c, seeds=[i]).images[0] for i, c in enumerate(some.labels)]
    assert (some.draw(some.enlarging(small, 2)).int() - from_pil(large).int()).abs().max() <= 1


def test_figures_of_reconstructions_are_those_of_what_the_tokenizer_loses() -> None:
    record = editing.measure_enlargements(subject(), Means(), lambda one, other: (one - other).mean((1, 2, 3)))
    assert record.keys() == {"2x", "4x"}
    for found in record.values():
        rebuilt = found["reconstructed"]
        assert rebuilt["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=0.02)
        assert rebuilt["st_lpips"] == pytest.approx(20 / 255, abs=1e-3)
        assert rebuilt["rms_of_input"] == pytest.approx(10, abs=0.3)  # the input is rounded
        assert rebuilt["FD-EffNetLite0"] == pytest.approx(300, rel=0.01)  # three means that moved by 10
        assert found["enlarged"]["rms_of_input"] <= 0.5 < found["bicubic"]["rms_of_input"]
    assert editing.perceived(None, subject().images, subject().images) is None


def test_reconstructions_lie_in_the_holes_only() -> None:
    some, mask = subject(), box(8, 12, (3, 2, 6, 4))
    edits = some.redrawing([mask] * 5)
    laid = laid_in(edits, torch.full_like(some.images, 128))
    assert (
        torch.equal(laid[:, :, ~mask], some.images[:, :, ~mask])
        and (laid[:, :, 3:5, 5:7] != some.images[:, :, 3:5, 5:7]).any()
    )
    assert square_inside(torch.full((3, 8, 12), 9), torch.full((3, 8, 12), 6), mask) == 9


def test_strength_begins_at_the_reconstruction_and_ends_at_a_new_picture() -> None:
    some = subject()
    record = editing.measure_strength(some)
    assert list(record["rms"]) == [str(step / 10) for step in range(1, 11)] and record["pictures"] == 5
    assert record["rms_of_reconstruction"] == pytest.approx(10, abs=0.01)
    new = (some.generate().double() - some.images).square().mean((1, 2, 3)).sqrt().mean()
    assert record["rms"]["1.0"] == pytest.approx(float(new), abs=0.01)
    assert record["rms_from_reconstruction_at_0.1"] < record["rms"]["1.0"]


def test_a_known_part_costs_no_more_than_a_new_picture_and_an_enlargement_less() -> None:
    record = editing.measure_cost(subject(batch=7), torch.device("cpu"))  # more than there are pictures
    flops = {name: record[name]["flops"] for name in ("new picture", "quarter", "strength 0.5", "enlarged 2x")}
    assert record["batch"] == 7 and flops["quarter"]["model"] <= flops["new picture"]["model"]
    assert flops["enlarged 2x"]["model"] < flops["strength 0.5"]["model"] < flops["new picture"]["model"]
    for name, found in flops.items():
        assert found["total"] == sum(count for part, count in found.items() if part != "total")
        assert record[name]["seconds"] > 0 and len(record[name]["seconds_all"]) == 5


def test_dit_is_measured_by_the_same_edits() -> None:
    """One stage, known pixels replaced at every step of any number; one stage is enough to enlarge twice."""
    pipe = Pipeline(random_dit(8), Darker(factor=1))
    few, many = (
        Subject(pipe, pipe.settings(steps), subject().images[..., :8], [0, 1, 2, 0, 1], 3) for steps in ((2,), (9,))
    )
    records = [editing.measure_holes(some, editing.Eyes(Means())) for some in (few, many)]
    assert records[0]["half"]["share"] == records[1]["half"]["share"] == 0.5
    assert records[0]["half"]["rms"] != records[1]["half"]["rms"] and records[0]["real"] == records[1]["real"]
    mask = holes(8, 8, 5)["half"]
    kept = ~torch.from_numpy(mask[0])
    assert torch.equal(few.draw(few.redrawing(mask))[..., kept], few.images[..., kept])
    record = editing.measure_enlargements(few, Means(), None)
    assert record["4x"] is None and record["2x"]["enlarged"]["st_lpips"] is None
    assert "enlarged 2x" in editing.measure_cost(few, torch.device("cpu"))


def test_accuracy_is_the_share_that_is_taken_for_the_class_asked_for() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    eyes = editing.Eyes(Means(), recognise=lambda some: torch.tensor([0, 2, 1, 1])[: len(some)])
    assert eyes.scores(images, [0, 1, 1, 1]) == {"accuracy": 0.75}
    assert editing.Eyes(Means()).scores(images, [None] * 4) == {"accuracy": None}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three 32 x 32 pictures without classes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_a_run_writes_the_record_that_it_prints_and_a_sheet(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures without classes are edited without a class, and nothing is said of accuracy."""
    monkeypatch.setattr(editing, "get_extractor", lambda *_args, **_kwargs: Means())
    out, picture = tmp_path / "editing.json", tmp_path / "sheet.png"
    words = ["cifar10", str(pictures), "--reference", str(pictures), "--parts", "holes", "--num", "3"]
    words += ["--steps", "1", "1", "--cache", str(tmp_path / "cache"), "--picture", str(picture), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["editing.py", *words])
    editing.main()
    record = json.loads(out.read_text())
    assert record == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["pictures"] == 3 and "enlarge" not in record and record["classifier"] is None
    assert record["holes"].keys() == {"real", "quarter", "half", "free_form"}
    assert record["holes"]["real"]["FD-EffNetLite0"] == pytest.approx(0, abs=1e-3)  # the same pictures
    assert record["holes"]["half"]["finished"]["accuracy"] is None
    with Image.open(picture) as image:
        assert image.size == (5 * 128, 3 * 128)


def test_wrong_input_ends_with_one_line(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, named in (
        (["--num", "1"], "--num"), (["--reference-num", "5"], "--reference-num"), (["--out", "x.txt"], "--out"),
        (["--picture", "x.png", "--parts", "cost"], "--picture"), (["--steps", "1"], "steps"),
        (["--classifier", "none.safetensors"], "classifier"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["editing.py", "cifar10", str(pictures), *words])
        with pytest.raises(SystemExit) as stop:
            editing.main()
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("editing.py: error: ") and named in error


def test_reducing_takes_means_of_squares() -> None:
    images = torch.tensor([[0, 4], [8, 12]], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert reduced(images, 2).flatten().tolist() == [6.0] * 3
    assert sheet([images[0]] * 10).size == (10 * 64, 4 * 64)
