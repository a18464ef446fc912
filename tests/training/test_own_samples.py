"""--data self:NUM, and the step away from what a training on own samples made of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_finetune import FREE, saved
from test_training import killed_at_five, options, weights

from conftest import random_model
from ecar.cli.main import main
from ecar.config import SamplingConfig
from ecar.files.options import changed
from ecar.pretrained.folders import load_model, save_model
from ecar.refine.neon import neon
from ecar.sampling.pipeline import Pipeline
from ecar.training import loop, own_samples
from ecar.training.config import TrainConfig


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source")


def own(out: Path, source: Path, data: str = "self:10", **changes: Any) -> TrainConfig:
    return options(Path(data), out, **{**FREE, "init_from": str(source), **changes})


def test_a_run_trains_on_what_its_source_draws_by_its_own_settings_class_by_class(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "run"
    loop.train(own(out, source))
    kept = load_file(out / "init" / "samples.safetensors")
    labels = [i % 3 for i in range(10)]
    assert kept["labels"].tolist() == labels
    pipe = Pipeline.from_pretrained(source)
    seeds = [own_samples._FIRST_SEED + i for i in range(10)]
    with torch.no_grad():
        pictures = pipe.tokenizer.decode(kept["latents"].float())
    for picture, image in zip(pictures, pipe(labels, seeds=seeds).images, strict=True):
        drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        assert (picture.clamp(-1, 1) - drawn).abs().max() < 0.02
    assert any(not torch.equal(w, b) for w, b in zip(weights(out).values(), _state(source).values(), strict=True))


def test_a_resumed_run_trains_on_the_same_samples_without_its_source(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(own(whole, source))
    with killed_at_five(monkeypatch):
        loop.train(own(parts, source))
    shutil.rmtree(source)
    loop.train(own(parts, source))
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    (parts / "init" / "samples.safetensors").unlink()
    with pytest.raises(ValueError, match="not the samples that the run began with"):
        loop.train(own(parts, source, max_steps=9))


def test_samples_of_other_options_are_drawn_again(tmp_path: Path, source: Path) -> None:
    """A run that stopped before its first checkpoint leaves them behind."""
    out = tmp_path / "run"
    drawn = []
    for data, seed in (("self:4", 0), ("self:6", 0), ("self:6", 1), ("self:6:5+5", 1)):
        config = own(out, source, data, seed=seed)
        found = loop.Source.find(config, out)
        assert found is not None
        (out / "init").mkdir(parents=True, exist_ok=True)
        config = found.with_defaults(config)
        own_samples.keep_own_samples(changed(config, device="cpu"), found)
        kept = own_samples._metadata(out / "init" / "samples.safetensors")
        assert kept is not None and kept["seed"] == str(seed)
        latents, _, _ = own_samples.read_own_samples(config, found)
        assert len(latents) == config.data.own_samples
        drawn.append(latents)
    assert not torch.equal(drawn[2], drawn[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "self:"}, "takes a number of samples"),
        ({"data": "self:0"}, "takes a number of samples"),
        ({"init_from": None}, "needs --init-from"),
        ({"flip": True}, "goes without"),
        ({"data": "self:10:2+3+4+5"}, "steps needs"),
        ({"data": "self:10:2+"}, "takes a number of samples"),
        ({"resolution": (16,)}, "draws images of"),
    ],
)
def test_own_samples_of_nothing_are_refused(
    tmp_path: Path, source: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loop.train(own(tmp_path / "run", source, **changes))


def test_options_are_checked_before_samples_are_drawn(tmp_path: Path, source: Path) -> None:
    """A size of which nothing fits was found after minutes of sampling."""
    with pytest.raises(ValueError, match="width 16"):
        loop.train(own(tmp_path / "run", source, preset="32x2x2+2"))
    assert not (tmp_path / "run" / "init" / "samples.safetensors").exists()


@pytest.mark.parametrize("sampling", [None, SamplingConfig(steps=(2, 1), guidance=(1.0, 1.0), fixed_steps=True)])
def test_a_model_that_takes_fixed_steps_or_names_none_does_not_train_on_its_own_samples(
    tmp_path: Path, sampling: SamplingConfig | None
) -> None:
    source = saved(tmp_path / "source", sampling=sampling)
    with pytest.raises(ValueError, match="cannot learn from its own samples"):
        loop.train(own(tmp_path / "run", source))


def test_neon_goes_as_far_the_other_way_and_the_record_says_from_what(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = loop.train(own(tmp_path / "run", source))
    out = tmp_path / "away"
    assert main(["neon", str(source), "--trained", str(trained), "--scale", "1.5", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    base, theirs, new = _state(source), _state(trained), _state(out)
    for name, w in new.items():
        torch.testing.assert_close(w, base[name] + 1.5 * (base[name] - theirs[name]))
    record = json.loads((out / "training.json").read_text())["neon"]
    (training,), (own_weights,) = record["trainings"], record["trained"]
    assert record["scale"] == 1.5 and training["data"] == "self:10" and training["max_steps"] == 6
    assert record["base"] == record["weights"]
    assert len({record["weights"], own_weights, printed["weights"]}) == 3
    assert load_model(out)[0].config == load_model(source)[0].config
    assert len(Pipeline.from_pretrained(out)(["one"]).images) == 1


def test_of_several_trainings_the_mean_counts(tmp_path: Path, source: Path) -> None:
    """Most of what one training of 400 steps does to the weights is chance."""
    runs = [loop.train(own(tmp_path / f"run{seed}", source, seed=seed)) for seed in (0, 1)]
    folder = neon(str(source), [str(run) for run in runs], 2.0, str(tmp_path / "away"))
    base, first, second, new = (_state(f) for f in (source, *runs, folder))
    for name, w in new.items():
        torch.testing.assert_close(w, 3 * base[name] - first[name] - second[name])
    record = json.loads((folder / "training.json").read_text())["neon"]
    assert [training["seed"] for training in record["trainings"]] == [0, 1] and len(set(record["trained"])) == 2


def test_a_student_moves_as_its_teacher_does(tmp_path: Path, source: Path) -> None:
    trained = loop.train(own(tmp_path / "run", source))
    steps = SamplingConfig(steps=(2, 1), guidance=(1.0, 1.0), fixed_steps=True)
    config = load_model(source)[0].config.replace(sampling=steps)
    student = tmp_path / "student"
    save_model(student, random_model(config, seed=5), load_model(source)[1])
    folder = neon(str(student), [str(trained)], 2.0, str(tmp_path / "away"), str(source))
    own_weights, base, theirs, new = (_state(f) for f in (student, source, trained, folder))
    for name, w in new.items():
        torch.testing.assert_close(w, own_weights[name] + 2 * (base[name] - theirs[name]))
    assert load_model(folder)[0].config.sampling == steps


@pytest.mark.parametrize("case", ["itself", "another", "scale", "full", "missing", "twice", "none"])
def test_neon_of_what_is_no_training_of_the_model_is_refused(
    tmp_path: Path, source: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other, missing = saved(tmp_path / "other", **({"width": 24} if case == "another" else {})), tmp_path / "none"
    if case == "twice":
        save_model(other, random_model(load_model(source)[0].config, seed=5), load_model(source)[1])
    away = {"itself": [source], "missing": [missing], "twice": [other, other], "none": []}.get(case, [other])
    out = tmp_path / "away"
    if case == "full":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    scale = "0" if case == "scale" else "1"
    assert main(["neon", str(source), "--trained", *map(str, away), "--scale", scale, "--out", str(out)]) == 2
    word = {"itself": "nothing", "another": "width", "scale": "--scale", "full": "new or empty"}
    word |= {"missing": "none", "twice": "twice", "none": "--trained"}
    error = capsys.readouterr().err
    assert word[case] in error and error.count("\n") == 1
    assert (case == "full") == out.exists()


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file((folder / "final" if (folder / "final").exists() else folder) / "model.safetensors")
