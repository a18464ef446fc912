"""What a run that is resumed may do otherwise: one rule, from what every option says of itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ecar.config import differences
from ecar.files.options import flag, flat, options_of, read_recipe, write_recipe
from ecar.training.engine.checkpoint import has_checkpoint

RECIPE = "recipe.toml"
_UNREADABLE = "restore it, or choose another --out"


def check_options(out: Path, kind: type, options: Any) -> None:
    """Compare options with those of the run in ``out``, where a checkpoint depends on them.

    Args:
        kind: the options as they can be asked for: their fields say what may differ.
        options: as resolved.

    Raises:
        ValueError: the run there has other options; each is named.
    """
    if not has_checkpoint(out):
        return
    record, fields = read_recipe(out / RECIPE, _UNREADABLE), options_of(kind)
    bound = {n: v for n, v in flat(options).items() if not fields[n].metadata.get("free")}
    now = json.loads(json.dumps({flag(name): value for name, value in bound.items()}))
    before = json.loads(json.dumps({flag(name): record.get(name, _default(fields[name])) for name in bound}))
    if refused := differences(before, now):
        raise ValueError(f"{out} holds a run with other options ({refused}); choose another --out")


def keep_options(out: Path, options: Any) -> None:
    """Write ``recipe.toml``, which ``--config`` takes."""
    write_recipe(out / RECIPE, options, leave_out=("config",))  # how it was asked for, not what


def check_max_steps(asked: int, taken: int, out: Path) -> None:
    """ValueError where a run has taken more steps than are asked for: its record would name a number that is none."""
    if taken > asked:
        raise ValueError(
            f"{out} has taken {taken} steps already, more than --max-steps {asked}; ask for {taken} or more, or choose "
            f"another --out"
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    """For an option that the record does not have: one that is newer than the run, or None."""
    return None if field.default is dataclasses.MISSING else field.default
