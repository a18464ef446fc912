"""``ecar fit``: folders of all kinds become models, a killed fit goes on, and wrong input is refused at once."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.cli.main import main
from ecar.evaluation.reference import RealImages
from ecar.fitting import parts, plan, run, tokens, trials
from ecar.fitting.measure import Reconstruction, Trial
from ecar.fitting.options import FitConfig
from ecar.fitting.run import fit
from ecar.fitting.split import Split, make_split
from ecar.fitting.tokens import Tokens, choose_tokenizer
from ecar.network import presets
from ecar.network.presets import Preset
from ecar.pretrained.folders import BUNDLED
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import load_tokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest size of models is smaller still, and few samples decide."""
    monkeypatch.setitem(presets.PRESETS, "nano", Preset(width=16, heads=2, trunk_depth=1, head_depth=1))
    monkeypatch.setattr(parts, "LEAST_JUDGED", 4)


def photographs(folder: Path, count: int, *, side: int = 16, mode: str = "RGB", seed: int = 0) -> Path:
    """Smooth coloured pictures, no two the same."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        small = random.integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
        Image.fromarray(small, mode).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def options(data: Path, out: Path, **changes: Any) -> FitConfig:
    values: dict[str, Any] = {
        "data": str(data), "out": str(out), "minutes": 1.0, "device": "cpu", "resolution": 16, "tokenizer": "pixels:2",
        "batch_size": 8, "max_steps": 4, "samples": 0, "critic_images": 0, "compile": 0, "start": "none",
    }  # fmt: skip
    return FitConfig.of(**{**values, **changes})


def test_pictures_with_alpha_in_classes_become_a_model_and_a_report(tmp_path: Path) -> None:
    """All parts, at 64 pixels; what cannot be read is named in the report."""
    for seed, name in enumerate(("cats", "dogs & wolves")):
        photographs(tmp_path / "photos" / name, 24, side=64, mode="RGBA", seed=seed)
    (tmp_path / "photos" / "cats" / "torn.png").write_bytes(b"\x89PNG torn")
    found = fit(
        options(
            tmp_path / "photos",
            tmp_path / "model",
            resolution=None,
            tokenizer=None,
            samples=6,
            student_steps=2,
            scales=2,
        )
    )
    pipe = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert pipe.class_names == ("cats", "dogs & wolves")
    assert pipe(labels=["cats"], seeds=[0]).images[0].size == (64, 64)
    assert found["steps"] == 4 and found["held_out_loss"] > 0
    report = (tmp_path / "model" / "report.html").read_text()
    assert report.count("data:image/") >= 4 and "torn.png" in report and "dogs &amp; wolves" in report
    assert "http://" not in report and "https://" not in report
    assert str(tmp_path) not in report and "MODEL/work/latents" in report  # it is published with the model
    recipe = tomllib.loads((tmp_path / "model" / "recipe.toml").read_text())
    assert set(recipe["choices"]) == {
        field.name for field in dataclasses.fields(FitConfig.of(data="a", out="b").choices)
    }


@pytest.mark.parametrize("classes", [["one class"], []])
def test_one_class_or_none_goes_without_guidance(tmp_path: Path, classes: list[str]) -> None:
    photographs(tmp_path / "photos" / "".join(classes), 300)
    fit(options(tmp_path / "photos", tmp_path / "model", student_steps=None))
    pipe = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert pipe.class_names == tuple(classes)
    assert tomllib.loads((tmp_path / "model" / "recipe.toml").read_text())["choices"]["student_steps"] == 0


def test_few_pictures_are_refused_before_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs(tmp_path / "photos", 5)
    assert main(["fit", str(tmp_path / "photos"), "--out", str(tmp_path / "model")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has 5 usable pictures" in last and "add pictures" in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--effort", "slow"], "--effort must be one of quick, good, best"),
        (["--minutes", "5", "--effort", "good"], "--minutes and --effort"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--samples", "1"], "--samples must be"),
        (["--tokenizer", "nowhere", "--resolution", "16"], "nowhere"),
        (["--resolution", "30", "--tokenizer", "pixels:4"], "30"),
    ],
)
def test_wrong_flags_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    photographs(tmp_path / "photos", 24)
    assert main(["fit", str(tmp_path / "photos"), "--out", str(tmp_path / "model"), *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_killed_fit_goes_on_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "photos" / "a", 24)
    config, calls = options(tmp_path / "photos", tmp_path / "model"), []
    for name in ("encode", "fit_model", "place_model"):
        monkeypatch.setattr(parts, name, counted(getattr(parts, name), calls, killed=name == "fit_model"))
    with pytest.raises(KeyboardInterrupt):
        fit(config)
    assert not (tmp_path / "model" / "config.json").exists()
    fit(config)
    fit(config)
    assert calls == ["encode", "fit_model", "fit_model", "place_model"]
    monkeypatch.setattr(run, "make_plan", None)  # nor is it planned again
    again = FitConfig.of(data=str(tmp_path / "photos"), out=str(tmp_path / "model"), minutes=1.0)
    assert fit(again)["steps"] == 4
    with pytest.raises(ValueError, match=r"holds a fit with --max-steps 4, not 5; choose another --out"):
        fit(options(tmp_path / "photos", tmp_path / "model", max_steps=5))


def counted(part: Callable[..., Any], calls: list[str], *, killed: bool) -> Callable[..., Any]:
    """The part, which notes that it is called; the first time it is killed, if it is to be."""

    def work(*arguments: Any) -> Any:
        calls.append(part.__name__)
        if killed and calls.count(part.__name__) == 1:
            raise KeyboardInterrupt
        return part(*arguments)

    return work


def test_a_recipe_makes_the_same_model_elsewhere(tmp_path: Path) -> None:
    photographs(tmp_path / "photos" / "a", 24)
    fit(options(tmp_path / "photos", tmp_path / "model"))
    assert main(["fit", "--config", str(tmp_path / "model" / "recipe.toml"), "--out", str(tmp_path / "other")]) == 0
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "other"))
    assert ours == theirs


def test_a_start_is_taken_by_its_name_and_kept_in_the_recipe(tmp_path: Path) -> None:
    """One trial, two steps, and the bundled model's sizes."""
    photographs(tmp_path / "photos", 24, side=32)
    asked = {"resolution": 32, "tokenizer": "cifar10", "start": "cifar10", "max_steps": 2}
    fit(options(tmp_path / "photos", tmp_path / "model", **asked))
    recipe = tomllib.loads((tmp_path / "model" / "recipe.toml").read_text())["choices"]
    assert (recipe["start"], recipe["preset"], recipe["stages"]) == ("cifar10", "192x6x1+6", 2)
    trained = json.loads((tmp_path / "model" / "training.json").read_text())
    assert trained["source"]["name"] == "cifar10" and trained["lr"] == trials.START_RATE
    assert Pipeline.from_pretrained(tmp_path / "model", device="cpu").settings().guidance == (1.0, 1.0)
    with pytest.raises(ValueError, match="`start` cifar10 has other latents or sizes than what was asked for"):
        fit(options(tmp_path / "photos", tmp_path / "other", **{**asked, "preset": "ti"}))


@pytest.mark.parametrize(("error", "start"), [(0.5, "cifar10"), (1.5, "none")])
def test_a_bundled_model_is_the_start_where_it_is_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, start: str
) -> None:
    """Both sides take as many steps; the plan says what both came to."""
    chosen = choose_tokenizer("cifar10", torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 600.0, "cpu", None)
    tried: list[tuple[str, int]] = []

    def trial(values: dict[str, Any], _: Any, steps: int = 0) -> Trial:
        tried.append((values.get("init_from", "none"), steps))
        loss = error if "init_from" in values else 1.0
        return Trial(start=1.0, step=0.05, update=0.0, sample=0.02, parameters=5_000_000, steps=9, loss=loss)

    found = a_plan(tmp_path, monkeypatch, 10.0, chosen, trial)
    assert (found.choices.start, found.choices.tokenizer) == (start, "cifar10")
    assert tried == [("none", 0), ("cifar10", 9)] and "held-out error" in found.why["start"]
    assert found.choices.lr == (trials.START_RATE if start == "cifar10" else trials.FRESH_RATE)


def test_the_pictures_of_a_short_fit_are_a_share_of_every_class(tmp_path: Path) -> None:
    """Encoding all of many pictures would take the time of the training."""
    for seed, (name, count) in enumerate({"a": 60, "b": 6, "c": 3}.items()):
        photographs(tmp_path / "photos" / name, count, seed=seed)
    split = make_split(options(tmp_path / "photos", tmp_path / "model").photographs, tmp_path / "split", 0, 600.0)
    some = split.limited(20, 0)
    assert some.images == len(list(some.train.rglob("*.png"))) == 20
    assert {folder.name for folder in some.train.iterdir()} == {"a", "b", "c"}
    assert all(Image.open(file).size == (16, 16) for file in some.train.rglob("*.png"))
    assert some.limited_to(None) == 20 and split.limited(20, 0).train == some.train and split.limited(900, 0) is split


def test_classes_without_a_held_out_picture_are_judged_without_classes(tmp_path: Path) -> None:
    """Evaluation refused other classes on the two sides, after all of the training."""
    for seed, count in enumerate((30, 8, 1)):
        photographs(tmp_path / "photos" / f"class {seed}", count, seed=seed)
    config = options(tmp_path / "photos", tmp_path / "model", samples=6)
    fit(config)
    split = make_split(config.photographs, tmp_path / "model" / "work" / "pictures", 0, 60.0)
    assert {folder.name for folder in split.held_out.iterdir()} == {"class 0", "class 1"}
    assert split.judged_by.name == "held_out_without_classes" and len(list(split.judged_by.iterdir())) == 8
    found = json.loads((tmp_path / "model" / "work" / "done.json").read_text())["evaluate"]["evaluation"]
    assert found["metrics"]["against"] == "8 real"


def test_decoders_of_the_same_latents_are_compared_by_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "photographs" and "butterflies" have one encoder; the sharper decoder has fewer decibels."""
    monkeypatch.setattr(tokens, "GOOD", 0.0)
    away = iter((0.2, 0.1))
    monkeypatch.setattr(tokens, "difference", lambda *_: next(away))
    images = torch.rand(2, 3, 128, 128).mul(255).byte()
    found = choose_tokenizer(None, images, 3600.0, "cpu", object())  # type: ignore[arg-type]
    assert found.name == "butterflies" and "photographs 0.2" in found.why


def test_few_steps_become_more_by_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 steps of 32 pictures taught nothing."""
    slow, fast = (a_plan(tmp_path, monkeypatch, 10.0, step=step) for step in (2.0, 0.02))
    assert (slow.choices.batch_size, fast.choices.batch_size) == (8, 32)


def test_a_step_is_not_spent_on_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon took 70% of the steps of 8 pictures that "butterflies" was trained further by."""
    found = a_plan(tmp_path, monkeypatch, 10.0, step=2.0, update=1.4)
    assert found.choices.batch_size == 32
    steps, each = found.choices.max_steps or 0, 1.4 + 0.6 * 32 / 8
    assert found.seconds["train"] == pytest.approx(1 + steps * each * 1.06)


def test_copies_of_a_picture_are_on_neither_side_twice(tmp_path: Path) -> None:
    """A copy among the held-out pictures would pass for memorisation."""
    photographs(tmp_path / "photos" / "a", 24)
    for number in range(6):
        data = (tmp_path / "photos" / "a" / f"{number}.png").read_bytes()
        (tmp_path / "photos" / "a" / f"copy{number}.png").write_bytes(data)
    split = make_split(options(tmp_path / "photos", tmp_path / "model").photographs, tmp_path / "split", 0, 600.0)
    assert (split.images, split.record["held_out"]) == (16, 8)
    files = [file.read_bytes() for folder in (split.train, split.held_out) for file in folder.rglob("*.png")]
    assert len(set(files)) == len(files) == 24


def a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, chosen: Tokens | None = None,
    trial: Callable[..., Trial] | None = None, **speed: float,
) -> plan.Plan:  # fmt: skip
    """Of 1,000 photographs of 10 classes on a machine of the given speed."""
    record = {"train": 950, "held_out": 50, "classes": list(map(str, range(10))), "side": 64.0}
    seconds = {"start": 1.0, "step": 0.05, "update": 0.0, "sample": 0.02, **speed}
    back = Reconstruction(torch.zeros(1, 3, 64, 64), 25.0, 1e-3, 1e-3, torch.zeros(16, 48, 16, 16))
    chosen = chosen or Tokens("pixels:4", load_tokenizer("pixels:4"), False, back, "said")
    trial = trial or (lambda *_: Trial(parameters=5_000_000, steps=9, loss=1.0, **seconds))
    images = torch.zeros(16, 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(plan, "read_images", lambda *_: RealImages(images, torch.zeros(16, dtype=torch.int64), ()))
    monkeypatch.setattr(plan, "choose_tokenizer", lambda *_: chosen)
    monkeypatch.setattr(trials, "try_training", trial)
    monkeypatch.setattr(trials, "_probe", lambda *_: None)
    monkeypatch.setattr(plan, "find_extractor", lambda _: (object(), ""))
    monkeypatch.setattr(plan, "extractor_speed", lambda *_: 0.005)
    config = FitConfig.of(data="photos", out="model", minutes=minutes, device="cpu")
    return plan.make_plan(config, Split(tmp_path, record), 2.0)


@pytest.mark.parametrize("minutes", [1.0, 10.0, 60.0])
def test_the_plan_fills_the_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float) -> None:
    found = a_plan(tmp_path, monkeypatch, minutes)
    total = sum(found.seconds.values())
    assert 0.8 * 60 * minutes < total < 1.1 * 60 * minutes, found.seconds
    assert found.choices.max_steps and found.choices.max_steps >= 20


def test_a_machine_that_is_too_slow_for_the_time_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = a_plan(tmp_path, monkeypatch, 1.0, step=10.0)
    assert found.choices.max_steps == 20 and "the least that is worth doing takes" in found.why["note"]
    assert "it sees 160, and 100,000 would take 34.7 h" in found.why["note"]


def test_the_summary_is_one_object_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs(tmp_path / "photos", 24)
    config = options(tmp_path / "photos", tmp_path / "model")
    words = ["--resolution", "16", "--tokenizer", "pixels:2", "--max-steps", "2", "--samples", "0", "--minutes", "1"]
    assert main(["fit", config.photographs.data, "--out", config.allowance.out, *words]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["steps"] == 2


def test_the_tokenizer_of_a_bundled_model_goes_by_its_name() -> None:
    """A recipe with a place inside the package would not work elsewhere."""
    images = torch.rand(2, 3, 64, 64).mul(255).byte()
    assert choose_tokenizer(None, images, 3600.0, "cpu", None).name == "cifar10"
    assert load_tokenizer("cifar10").fingerprint() == load_tokenizer(BUNDLED / "cifar10" / "tokenizer").fingerprint()


def test_photographs_get_the_smallest_latent_that_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """More decibels are no use to a model that has eight times as many numbers to draw."""
    decibels = {"photographs": 24.6, "cifar10": 32.7}

    def measured(tokenizer: Any, images: torch.Tensor, *_: Any) -> Reconstruction:
        if tokenizer.factor == 4 and tokenizer.image_channels == 1:
            raise ValueError("grey")
        return Reconstruction(
            images, decibels["photographs" if tokenizer.factor == 16 else "cifar10"], 0.1, 0.1, images
        )

    monkeypatch.setattr(tokens, "reconstruct", measured)
    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    assert choose_tokenizer(None, images, 3600.0, "cpu", None).name == "photographs"
    decibels.update(photographs=18.0, cifar10=19.0)
    found = choose_tokenizer(None, images, 3600.0, "cpu", None)
    assert (found.name, found.train) == ("photographs", True)
    assert choose_tokenizer(None, images, 60.0, "cpu", None).name == "cifar10"
    decibels.update(photographs=12.0, cifar10=13.0)
    assert choose_tokenizer(None, images, 60.0, "cpu", None).name == "pixels:8"
