"""The held-out loss of a run: fixed draws, the same training, and refusals before anything is encoded."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ecar.data.encoding import EncodePlan, encode_shards
from ecar.data.source import BadImages, load_source
from ecar.tokenizers import PixelTokenizer
from ecar.training import build, held_out, loop
from ecar.training.config import TrainConfig
from ecar.training.engine.log import read_log
from ecar.training.held_out import HeldOut
from ecar.training.watch import HeldOutLoss


def options(data: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "data": str(data), "out": str(out), "tokenizer": "pixels:2", "resolution": (8,), "preset": "16x2x1+1",
        "max_steps": 4, "batch_size": 8, "save_every": 2, "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    return TrainConfig.of(**{**values, **changes})


def of_steps(out: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_log(out) if name in line}


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look with every line of the log, however much time that takes."""
    monkeypatch.setattr("ecar.training.watch._COST", 1e9)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("preset", ["16x2x1+1", "dit-16x2x1+1"])
def test_a_held_out_loss_of_every_stage_is_logged_and_training_is_the_same(
    digits_folder: Path, tmp_path: Path, preset: str
) -> None:
    runs = {"with": {"val_data": str(digits_folder)}, "without": {}}
    for name, more in runs.items():
        loop.train(options(digits_folder, tmp_path / name, preset=preset, **more))
    found = of_steps(tmp_path / "with", "val_loss")
    assert list(found) == [1, 2, 3, 4] and all(0 < value < 4 for value in found.values())
    last = "val_loss_1" if preset.startswith("dit") else "val_loss_2"
    assert list(of_steps(tmp_path / "with", last)) == [1, 2, 3, 4]
    assert (tmp_path / "with" / "loss.png").exists()
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in runs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.usefixtures("often")
def test_noise_and_times_are_the_same_every_time(digits_folder: Path, tmp_path: Path) -> None:
    """Of weights that do not move, the curve is flat: what moves in it is the model."""
    run = options(digits_folder, tmp_path / "run", val_data=str(digits_folder), lr=1e-30)
    loop.train(run)
    found = of_steps(tmp_path / "run", "val_loss")
    assert len(found) == 4 and len(set(found.values())) == 1


def test_a_share_is_held_out_of_what_is_trained_on(digits_folder: Path, tmp_path: Path) -> None:
    config = options(digits_folder, tmp_path, val_data="0.1").resolve()
    held = HeldOut.open(config)
    assert held is not None
    table, tokenizer = build.load_table(config, None, held)
    rest, kept = held.tables(config, table, tokenizer)
    assert (len(rest), len(kept)) == (108, 12)
    rows = [t.batch(torch.zeros(len(t), dtype=torch.long), torch.arange(len(t))) for t in (rest, kept, table)]
    together = torch.cat(rows[:2]).flatten(1)
    assert torch.equal(together.sum(0).round(decimals=2), rows[2].flatten(1).sum(0).round(decimals=2))


def test_held_out_images_of_some_of_the_classes_have_the_ids_of_all(digits_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_folder / "seven", tmp_path / "some" / "Seven")
    config = options(digits_folder, tmp_path, val_data=str(tmp_path / "some")).resolve()
    held = HeldOut.open(config)
    assert held is not None
    table, tokenizer = build.load_table(config, None, held)
    kept = held.tables(config, table, tokenizer)[1]
    assert {table.class_names[label] for label in kept.labels.tolist()} == {"seven"}


@pytest.mark.parametrize(
    ("share", "message"),
    [("1.5", "between 0 and 1"), ("0.001", "0 of 120 images"), ("nowhere", "no such file"), ("", "empty")],
)
def test_a_share_that_is_none_is_refused(digits_folder: Path, tmp_path: Path, share: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.train(options(digits_folder, tmp_path / "run", val_data=share))


def test_held_out_data_of_another_kind_are_refused_before_anything_is_encoded(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits_folder / "one", tmp_path / "unknown" / "two")
    for name, factor, side in (("other", 4, 8), ("larger", 2, 16)):
        tokenizer, feed = PixelTokenizer(factor=factor), load_source(str(digits_folder))
        (tmp_path / name).mkdir()
        encode_shards(feed, tokenizer, tmp_path / name, EncodePlan(side=(side, side)), bad=BadImages())

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("images were encoded")

    for module in (build, held_out):
        monkeypatch.setattr(module, "encode_source", fails)
    for name, message in (("unknown", "the classes"), ("other", "another tokenizer"), ("larger", "images of")):
        with pytest.raises(ValueError, match=f"--val-data .*{name} .*{message}"):
            loop.train(options(digits_folder, tmp_path / "run", val_data=str(tmp_path / name)))


@pytest.mark.usefixtures("often")
def test_patience_ends_a_run_once_and_final_is_the_last_average_before_the_loss_rose(
    digits_folder: Path, tmp_path: Path
) -> None:
    """The same command again must not train on from where the loss turned."""
    held, few = tmp_path / "held", tmp_path / "few"
    for name in ("zero", "one", "seven"):  # few images, learnt by heart at a large rate
        (few / name).mkdir(parents=True)
        shutil.copy(digits_folder / name / "0.png", few / name)
    shutil.copytree(digits_folder, held)
    run = options(few, tmp_path / "run", val_data=str(held), patience=2, max_steps=400, lr=3e-2)
    final = loop.train(run)
    found = of_steps(tmp_path / "run", "val_loss")
    last = max(found)
    assert last < 400 and min(found.values()) < found[last]
    best, kept = load_file(tmp_path / "run" / "best.safetensors"), load_file(final / "model.safetensors")
    assert all(torch.equal(best[name], kept[name]) for name in best)
    loop.train(run)
    assert max(of_steps(tmp_path / "run", "val_loss")) == last


@pytest.mark.parametrize(
    ("losses", "turned"),
    [
        ([1.0, 0.5, 0.505, 0.508], False),
        ([1.0, 0.5, 0.52, 0.53], True),
        ([0.5, 0.53, 0.505], False),
        ([0.6, 0.5], False),
    ],
)
def test_a_held_out_loss_that_is_flat_has_not_turned(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], turned: bool
) -> None:
    """A rise of 0.3% ended a training of 285 photographs after a fifth of its steps; the rest made better samples."""
    watch = object.__new__(HeldOutLoss)
    watch.task = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(patience=2)))  # type: ignore[assignment]
    monkeypatch.setattr(HeldOutLoss, "_losses", lambda _: losses)
    assert watch.turned == turned


def test_patience_needs_held_out_data(digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--patience .* needs --val-data"):
        options(digits_folder, tmp_path, patience=3)
