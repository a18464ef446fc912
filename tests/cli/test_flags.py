"""The flags of every verb, kept in flags.json: a flag that goes, or comes, is meant."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro

from ecar.cli.main import VERBS
from ecar.cli.options import CONFIG, changed, fields_of, flat, name_flags, parse

KEPT = Path(__file__).parent / "flags.json"


def flags_of(verb: str) -> list[str]:
    """What tyro knows: flags, and what stands without one in capitals."""
    parser = tyro.extras.get_parser(importlib.import_module(f"ecar.cli.{verb}").OPTIONS, config=CONFIG)
    known: list[str] = []
    for action in parser._actions:
        known += [word for word in action.option_strings if word.startswith("--")] or [str(action.metavar)]
    return sorted(set(known) - {"--help", "-h"})


@pytest.mark.filterwarnings("ignore:get_parser")
def test_the_flags_of_every_verb_are_those_that_are_kept() -> None:
    found = {verb: flags_of(verb) for verb in VERBS}
    kept = json.loads(KEPT.read_text())
    apart = {
        verb: sorted(set(found.get(verb, ())) ^ set(kept.get(verb, ())))
        for verb in found.keys() | kept.keys()
        if found.get(verb) != kept.get(verb)
    }
    assert not apart, f"flags came or went: {apart}; if they should, run: python {Path(__file__).name} in tests/cli"


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group."""

    steps: tuple[int, ...] | None = None
    """Steps."""
    guidance_from: tuple[float, ...] | None = None
    """Times."""

    def check(self) -> None:
        if self.steps == (0,):
            raise ValueError("`steps` must be positive")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options."""

    seed: int = 0
    """Seed."""
    group: Group = field(default_factory=Group)
    """A group."""


def test_flags_of_a_group_are_flat_take_commas_and_are_checked() -> None:
    assert [name for name, _ in fields_of(Options)] == ["seed", "steps", "guidance_from"]
    options = parse(Options, ["--steps", "8,4", "--guidance-from=0.5,0", "--seed", "3"], "verb")
    assert options == Options(seed=3, group=Group(steps=(8, 4), guidance_from=(0.5, 0.0)))
    assert flat(options) == {"seed": 3, "steps": (8, 4), "guidance_from": (0.5, 0.0)}
    assert changed(options.group) == ["--steps", "--guidance-from"] and changed(Group()) == []
    with pytest.raises(ValueError, match="must be positive"):
        parse(Options, ["--steps", "0"], "verb")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("steps needs 2 positive numbers", "--steps needs 2 positive numbers"),
        ("guidance_from needs one time in [0, 1)", "--guidance-from needs one time in [0, 1)"),
        ("`steps` 3: leave `seed` out", "--steps 3: leave --seed out"),
        ("cannot (guidance_from, seed)", "cannot (--guidance-from, seed)"),
        ("the seed of all steps must be known", "the seed of all steps must be known"),
        ("/data/guidance_from/x: 'guidance_from' is no folder", "/data/guidance_from/x: 'guidance_from' is no folder"),
        ("guidance_from.json: not JSON; `other` is", "guidance_from.json: not JSON; `other` is"),
    ],
)
def test_messages_name_fields_as_the_flags_that_the_user_typed(message: str, told: str) -> None:
    """Library and command line each had a spelling: guidance_from needs, --acceptance needs."""
    assert name_flags(message, Options) == told


if __name__ == "__main__":
    KEPT.write_text(json.dumps({verb: flags_of(verb) for verb in VERBS}, indent=1) + "\n")
