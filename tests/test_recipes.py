"""Recipes give commands that exist: options were renamed, and the commands of a model's card stayed behind."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = {
    "cifar10": "TRAIN TEST",
    "fashion": "",
    "butterflies": "TRAIN DOGS TEST",
    "study_32": "cifar10 TRAIN TEST",
    "study_256": "TRAIN TEST",
    "study_imagewoof": "TRAIN TEST",
}


def fields_of(options: type) -> set[str]:
    """Names of all options, those of groups within too."""
    names: set[str] = set()
    for name, kind in get_type_hints(options).items():
        names |= fields_of(kind) if dataclasses.is_dataclass(kind) else {name}
    return names


def commands_of(recipe: str, tmp_path: Path) -> list[list[str]]:
    """What a recipe runs, in order, on a machine where every program only notes its arguments."""
    for program in ("ecar", "python"):
        script = tmp_path / "bin" / program
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nprintf "%s\\n" {program} "$@" >> "$NOTES"\necho >> "$NOTES"\n')
        script.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes"), "RUNS": "runs"}
    subprocess.run(["sh", f"recipes/{recipe}.sh", *RECIPES[recipe].split()], cwd=ROOT, env=environment, check=True)
    return [part.split("\n") for part in (tmp_path / "notes").read_text().strip().split("\n\n")]


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.sh")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_of_a_recipe_exists_with_its_options(recipe: str, tmp_path: Path) -> None:
    commands = commands_of(recipe, tmp_path)
    assert len(commands) > 5
    for program, name, *words in commands:
        flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        if program == "python":
            source = (ROOT / name).read_text()
            known = set(re.findall(r'"--([\w-]+)"', source)) | {"ecar", "dit", "ecar-model", "dit-model"}
            known |= set(re.findall(r'"([\w-]+)"', source)) if "candidates.py" in name else set()
            assert {flag.replace("_", "-") for flag in flags} <= known, (recipe, name)
        else:
            assert set(flags) <= fields_of(importlib.import_module(f"ecar.cli.{name}").OPTIONS), (recipe, name)


def test_fashion_is_the_model_of_its_recipe(tmp_path: Path) -> None:
    """training.json named the model's own run, twice, in the place of the trainings that it steps away from."""
    commands = [command for command in commands_of("fashion", tmp_path) if command[:2] == ["ecar", "train"]]
    record = json.loads((ROOT / "src/ecar/bundled/fashion/training.json").read_text())
    for command, trained in zip(commands, (record, *record["neon"]["trainings"]), strict=True):
        for name in ("max-steps", "batch-size", "lr", "seed"):
            assert float(command[command.index(f"--{name}") + 1]) == trained[name.replace("-", "_")]
