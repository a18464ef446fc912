"""Recipes: options of a run in a file, which are options of another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecar.cli.options import parse
from ecar.files.options import changed, flat, options_of, write_recipe
from ecar.training.config import TokenizerConfig, TrainConfig
from ecar.training.inputs import DistillOptions

TRAIN = ["--data", "d", "--out", "o", "--stages", "0.6", "1", "--flip", "--lr", "0.002"]


def test_a_recipe_is_the_flags_that_it_came_from_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    config = parse(TrainConfig, [*TRAIN, "--tokenizer", 'a "name"\\ of é'], "train")
    write_recipe(path, config)
    again = parse(TrainConfig, ["--config", str(path)], "train")
    assert changed(again, config=None) == config
    other = parse(TrainConfig, ["--seed", "3", "--no-flip", f"--config={path}", "--stages", "0.8,1"], "train")
    assert changed(other, config=None) == changed(config, seed=3, flip=False, stages=(0.8, 1.0))


def test_the_resolved_options_of_a_run_are_a_recipe_of_the_same_run(tmp_path: Path) -> None:
    path, resolved = tmp_path / "recipe.toml", parse(TrainConfig, TRAIN, "train").resolve()
    write_recipe(path, resolved)
    assert changed(parse(TrainConfig, ["--config", str(path)], "train").resolve(), config=None) == resolved
    assert resolved.model.preset == "192x6x4+4"


def test_recipes_by_hand_need_no_tables_and_wrong_ones_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('data = ["a", "b"]\nout = "o"\nscale-levels = 2\n')
    config = parse(TokenizerConfig, ["--config", str(path)], "tokenizer")
    assert config.data.data == ("a", "b") and config.loss.scale_levels == 2
    for text, words in (("widht = 3", "there are no options widht"), ("lr =", "cannot be read"), ("lr = -1", "--lr")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            parse(TrainConfig, [*TRAIN[:4], "--config", str(path)], "train")


@pytest.mark.parametrize("kind", [TrainConfig, TokenizerConfig])
def test_no_two_groups_share_a_name_and_some_options_are_free(kind: type) -> None:
    names = [name for group in options_of_groups(kind) for name in group]
    assert len(names) == len(set(names)) == len(options_of(kind))
    assert {bool(field.metadata.get("free")) for field in options_of(kind).values()} == {True, False}


def options_of_groups(kind: type) -> list[list[str]]:
    import typing

    return [list(options_of(group)) for group in typing.get_type_hints(kind).values()]


def test_wrong_options_of_a_group_are_one_line_that_names_the_flag() -> None:
    with pytest.raises(ValueError, match=r"^--stage-share must start at 1"):
        parse(TrainConfig, [*TRAIN, "--stage-share", "0.5", "1"], "train")
    with pytest.raises(ValueError, match=r"^--lora-rank needs --init-from"):
        parse(TrainConfig, [*TRAIN, "--lora-rank", "2"], "train")
    assert flat(parse(TrainConfig, TRAIN, "train"))["distill"] is None
    assert parse(DistillOptions, ["--distill"], "train").distill == ()
    assert parse(DistillOptions, ["--distill", "1.3@0.5", "2"], "train").guidance == ((1.3, 2.0), (0.5, 0.0))
