"""Flags from dataclasses, and messages that name them as they are typed."""

from __future__ import annotations

import dataclasses
import re
import typing
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from ecar.files.commit import source_commit as source_commit
from ecar.files.options import flag as _flag
from ecar.files.options import flat as flat
from ecar.files.options import recipe_flags
from ecar.files.records import output_file as output_file

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Number = TypeVar("Number", int, float)
CONFIG = (tyro.conf.OmitArgPrefixes,)  # of tyro: the flags of nested groups have no prefix
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def parse(kind: type[T], arguments: Sequence[str], verb: str) -> T:
    """A dataclass of options from the command line. In lists of numbers, commas work as well as blanks.

    Groups of options in it are flat. ``--config FILE``, where there is such an option, stands for the flags of a
    recipe; all others win over it.

    Wrong flags end the process with exit code 2 and a message (tyro's). ValueError comes from the dataclass itself, and
    from its groups and their ``check``, for ``main`` to make one line of: inside tyro it would become a box of several.
    """
    fields = dict(fields_of(kind))
    words = _split_lists(arguments, {_flag(name) for name, hint in fields.items() if _is_list(hint)})
    if "config" in fields:
        words = [*_recipes(words, kind), *words]
    found: Any = tyro.cli(_unchecked(kind), args=words, prog=f"ecar {verb}", config=CONFIG)
    return _checked(kind, found)


def _unchecked(kind: type) -> type:
    """The same dataclass without its checks, nor those of its groups."""
    hints = typing.get_type_hints(kind)
    own = {f.name: hints[f.name] for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])}
    groups = {name: _unchecked(typing.cast(type, group)) for name, group in own.items()}
    body: dict[str, Any] = {"__post_init__": lambda _: None, "__doc__": kind.__doc__, "__annotations__": groups}
    for field in dataclasses.fields(kind):
        if field.name in groups:
            needed = field.default_factory is dataclasses.MISSING
            body[field.name] = dataclasses.field() if needed else dataclasses.field(default_factory=groups[field.name])
    return dataclasses.dataclass(frozen=True, kw_only=True)(type(kind.__name__, (kind,), body))


def _checked(kind: type[T], found: Any) -> T:
    """The values of an unchecked one, checked."""
    hints = typing.get_type_hints(kind)
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            values[name] = group = _checked(hints[name], value)
            if hasattr(group, "check"):
                group.check()
    return kind(**values)


def _recipes(words: list[str], kind: type) -> list[str]:
    """The flags that every ``--config`` stands for."""
    given = [after for word, after in pairwise(words) if word == "--config"]
    given += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return [word for file in given for word in recipe_flags(Path(file).expanduser(), kind)]


def fields_of(kind: type) -> Iterator[tuple[str, Any]]:
    """Name and type of every option, those of nested groups too; not of what has no flag (positional)."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from fields_of(typing.cast(type, hint))
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()):
            yield name, hint


def name_flags(message: str, kind: type) -> str:
    """A message of the library, which names fields, with the flags that a user types: ``steps needs`` is
    ``--steps needs``.

    Fields are what is called as one: with an underscore in it, between backquotes, or the first word before must, needs
    or takes.
    """
    flags = {name: _flag(name) for name, _ in fields_of(kind)}

    def flag(found: re.Match[str]) -> str:
        return flags.get(found[1], found[0])

    message = re.sub(r"`(\w+)`", flag, message)
    message = re.sub(r"(?<![^\s(])([a-z]+_\w+)(?![^\s,;:.)]|\.\S)", flag, message)
    return re.sub(r"^(\w+)(?= (?:must|needs|takes) )", flag, message)


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple or any(map(_is_list, typing.get_args(hint)))


def _split_lists(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """``--steps 8,8`` and ``--steps=8,8`` -> ``--steps 8 8``, for the flags in ``lists`` only."""
    result: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            inside = flag.replace("_", "-") in lists
            if not (inside and equals):
                result.append(argument)
                continue
            result.append(flag)
            argument = value
        result += argument.split(",") if inside else [argument]
    return result


def one_or_all(values: tuple[Number, ...] | None) -> tuple[Number, ...] | Number | None:
    """A list of one number as that number: it stands for every stage."""
    return values[0] if values is not None and len(values) == 1 else values


def changed(*groups: Any) -> list[str]:
    """Flags of these groups that are not at their defaults."""
    return [
        _flag(f.name)
        for group in groups
        for f in dataclasses.fields(group)
        if getattr(group, f.name) != getattr(type(group)(), f.name)
    ]


def check_dtype(name: str) -> None:
    """ValueError unless ``name`` is fp32 or bf16; torch is not imported."""
    if name not in _DTYPES:
        raise ValueError(f"--dtype must be fp32 or bf16, got {name!r}")


def usable_dtype(name: str, device: str) -> str:
    """A checked name, or fp32, with a warning, in place of bf16 on a device that only imitates it.

    Raises:
        ValueError: no such device.
    """
    from ecar.devices import computes_bfloat16, resolve_device

    device = resolve_device(device)
    if name == "fp32" or computes_bfloat16(device):
        return name
    warnings.warn(f"this {device} only imitates bfloat16, which is slow: float32 is computed instead", stacklevel=2)
    return "fp32"


def torch_dtype(name: str) -> torch.dtype:
    """torch's type of a checked name."""
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype
