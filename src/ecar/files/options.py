"""Options in groups: frozen dataclasses of dataclasses, whose names are as different as if they were one.

On the command line and in records they are flat; in a recipe (TOML) and in Python every group is a part of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from ecar.files.records import write_atomically

T = TypeVar("T")


def option(default: Any = dataclasses.MISSING, *, free: bool) -> Any:
    """A field of a group that may differ (``free``) from that of the run that is resumed; other fields may not."""
    return dataclasses.field(default=default, metadata={"free": free})


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def options_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Every option by its name, those of groups too."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        group = hints[field.name]
        found |= options_of(group) if dataclasses.is_dataclass(group) else {field.name: field}  # type: ignore[arg-type]
    return found


def flat(options: Any) -> dict[str, Any]:
    """The value of every option by its name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def from_flat(kind: type[T], values: dict[str, Any]) -> T:
    """The inverse of ``flat``: what is left out is at its default.

    Raises:
        TypeError: a name that is none.
    """
    if unknown := set(values) - set(options_of(kind)):
        raise TypeError(f"{kind.__name__} has no options {', '.join(sorted(unknown))}")
    hints, parts = typing.get_type_hints(kind), dict[str, Any]()
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        group = hints[field.name]
        if dataclasses.is_dataclass(group):
            own = options_of(group)  # type: ignore[arg-type]
            parts[field.name] = from_flat(group, {n: v for n, v in values.items() if n in own})  # type: ignore[arg-type]
        elif field.name in values:
            parts[field.name] = values[field.name]
    return kind(**parts)


def changed(options: T, **values: Any) -> T:
    """A copy with some options changed, by their names."""
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}  # type: ignore[arg-type]
    own: dict[str, Any] = {}
    for name, value in fields.items():
        if dataclasses.is_dataclass(value):
            theirs = {n: values.pop(n) for n in options_of(type(value)) if n in values}
            own |= {name: changed(value, **theirs)} if theirs else {}
        elif name in values:
            own[name] = values.pop(name)
    if values:
        raise TypeError(f"{type(options).__name__} has no options {', '.join(sorted(values))}")
    return dataclasses.replace(options, **own)  # type: ignore[type-var]


def write_recipe(path: Path, options: Any, leave_out: tuple[str, ...] = ()) -> None:
    """Options as TOML, a table per group; what is None has no line."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        group = getattr(options, field.name)
        if dataclasses.is_dataclass(group):
            values[field.name] = {n: v for n, v in flat(group).items() if n not in leave_out}
        elif field.name not in leave_out:
            values[field.name] = group
    write_atomically(path, recipe_text(values).encode())


def recipe_text(values: dict[str, Any]) -> str:
    """TOML of options and tables of options; what is None has no line."""
    lines: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *(_line(n, v) for n, v in value.items() if v is not None)]
        elif value is not None:
            lines.insert(0, _line(name, value))  # before all tables
    return "\n".join(lines).strip() + "\n"


def read_recipe(path: Path, remedy: str) -> dict[str, Any]:
    """What ``write_recipe`` wrote, or somebody by hand, flat: with or without tables.

    Raises:
        ValueError: not to be read as TOML; it says so with the ``remedy``.
    """
    values: dict[str, Any] = {}
    for name, value in read_tables(path, remedy).items():
        values |= value if isinstance(value, dict) else {name: value}
    return {name.replace("-", "_"): value for name, value in values.items()}


def read_tables(path: Path, remedy: str) -> dict[str, Any]:
    """A file of TOML as it is; ValueError with the ``remedy`` where it is none."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {remedy}") from None


def recipe_flags(path: Path, kind: type) -> list[str]:
    """A recipe as flags of the command line.

    Raises:
        ValueError: no recipe, or one with options that ``kind`` has not.
    """
    values, words = read_recipe(path, "give another --config"), list[str]()
    if unknown := sorted(set(values) - set(options_of(kind))):
        raise ValueError(f"--config {path}: there are no options {', '.join(unknown)}; take them out")
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list):
            words += [flag(name), *map(str, value)]
        else:
            words.append(f"{flag(name)}={value}")
    return words


def _line(name: str, value: Any) -> str:
    return f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"{value}"
    # A JSON string is a TOML string, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
