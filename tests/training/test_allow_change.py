"""--allow-change: named changes are let through and logged, all others are refused as before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import lines, options

from ecar.training import loop
from ecar.training.config import TrainConfig
from ecar.training.run import _is_place


def test_named_options_change_and_the_log_says_so(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(options(digits_folder, tmp_path))
    changed = {"batch_size": 4, "label_dropout": 0.2, "max_steps": 8}
    with pytest.raises(ValueError, match=r"other options \(--batch-size 8 -> 4\)"):
        loop.train(options(digits_folder, tmp_path, **changed, allow_change=("label-dropout",)))
    loop.train(options(digits_folder, tmp_path, **changed, allow_change=("batch-size", "label_dropout")))
    said = [line["changed"] for line in lines(tmp_path) if "changed" in line]
    assert said == ["--label-dropout 0.1 -> 0.2; --batch-size 8 -> 4"]
    assert said[0] in capsys.readouterr().err and lines(tmp_path)[-1]["step"] == 8
    assert [line["images"] for line in lines(tmp_path) if "images" in line][-3:] == [48, 52, 56]  # it fell to 28
    loop.train(options(digits_folder, tmp_path, **{**changed, "max_steps": 9}))  # now these are the run's options
    with pytest.raises(ValueError, match="--batch-size 4 -> 8"):
        loop.train(options(digits_folder, tmp_path))


def test_more_images_are_let_through_and_renamed_classes_are_not(digits_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    loop.train(options(data, tmp_path / "run"))
    shutil.copy(data / "one" / "0.png", data / "one" / "more.png")
    with pytest.raises(ValueError, match="images 120 -> 121"):
        loop.train(options(data, tmp_path / "run", max_steps=8))
    (data / "zero").rename(data / "zip")
    with pytest.raises(ValueError, match="class_names") as refused:
        loop.train(options(data, tmp_path / "run", max_steps=8, allow_change=("images",)))
    assert "121" not in str(refused.value)
    (data / "zip").rename(data / "zero")
    # Pixels are scaled to unit spread by statistics of the data: that is another tokenizer, and has to be named.
    with pytest.raises(ValueError, match=r"changed since the checkpoint \(tokenizer"):
        loop.train(options(data, tmp_path / "run", max_steps=8, allow_change=("images",)))
    loop.train(options(data, tmp_path / "run", max_steps=8, allow_change=("images", "tokenizer")))
    assert "images 120 -> 121" in next(str(line["changed"]) for line in lines(tmp_path / "run") if "changed" in line)


def test_a_further_average_starts_as_the_first_one(digits_folder: Path, tmp_path: Path) -> None:
    loop.train(options(digits_folder, tmp_path, ema=(0.3,)))
    loop.train(options(digits_folder, tmp_path, ema=(0.3, 0.1), max_steps=7, allow_change=("ema",)))
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("final", "final_ema_0.1"))
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("key", ["width", "optimizer", "no_such_option"])
def test_what_cannot_change_or_does_not_exist_is_refused_at_once(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key.replace('_', '-')} cannot change within a run.*what can: batch-size"):
        TrainConfig.of(data="d", out="o", allow_change=(key,))


def test_a_refused_resume_leaves_the_run_its_options(digits_folder: Path, tmp_path: Path) -> None:
    """They were written before the data had been accepted: the run's own command was refused then."""
    loop.train(options(digits_folder, tmp_path / "run"))
    other = tmp_path / "other"
    shutil.copytree(digits_folder / "one", other / "one")
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        loop.train(options(other, tmp_path / "run", allow_change=("data", "tokenizer")))
    assert loop.train(options(digits_folder, tmp_path / "run", max_steps=7)).exists()


def test_a_save_that_was_killed_is_no_run_yet(digits_folder: Path, tmp_path: Path) -> None:
    """What its first save left refused other options, with nothing to lose."""
    (tmp_path / "run" / "checkpoints" / "step_00000004.tmp").mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml").write_text("batch_size = 2")
    assert loop.train(options(digits_folder, tmp_path / "run", max_steps=1)).exists()


def test_fewer_steps_than_were_taken_are_refused(digits_folder: Path, tmp_path: Path) -> None:
    """The final model was written again, with a record of a training that is shorter than it was."""
    loop.train(options(digits_folder, tmp_path / "run"))
    before = (tmp_path / "run" / "final" / "training.json").read_bytes()
    with pytest.raises(ValueError, match="has taken 6 steps already, more than --max-steps 4"):
        loop.train(options(digits_folder, tmp_path / "run", max_steps=4))
    assert (tmp_path / "run" / "final" / "training.json").read_bytes() == before


@pytest.mark.parametrize("content", ["batch_size =", "[1"])
def test_damaged_options_of_a_run_are_an_error_that_names_the_file(
    content: str, digits_folder: Path, tmp_path: Path
) -> None:
    loop.train(options(digits_folder, tmp_path / "run", max_steps=1))
    (tmp_path / "run" / "recipe.toml").write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.toml: .*choose another --out"):
        loop.train(options(digits_folder, tmp_path / "run", max_steps=2))


def test_a_run_without_its_options_is_not_taken_for_a_new_one(digits_folder: Path, tmp_path: Path) -> None:
    """Checkpoints copied without their options went on under another seed and batch size, without a word."""
    loop.train(options(digits_folder, tmp_path / "run", max_steps=1))
    (tmp_path / "run" / "recipe.toml").unlink()
    with pytest.raises(ValueError, match=r"recipe\.toml: cannot be read .*restore it"):
        loop.train(options(digits_folder, tmp_path / "run", max_steps=2, batch_size=4))


def test_a_pattern_of_files_is_a_place_on_the_machine(tmp_path: Path) -> None:
    """It was published with its folders: no file has that name."""
    assert _is_place("client/j*.tar") and _is_place(str(tmp_path)) and not _is_place("owner/name")


def test_context_noise_that_is_no_number_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    """Five steps without a finite loss later, the advice was a lower learning rate."""
    with pytest.raises(ValueError, match="--context-noise must be a number of at least 0"):
        loop.train(options(digits_folder, tmp_path / "run", context_noise=float("nan")))
