"""Flags from dataclasses."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from ecar.config import check_acceptance
from ecar.files.commit import source_commit as source_commit
from ecar.files.options import flag, options_of, recipe_flags

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Number = TypeVar("Number", int, float)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def parse(kind: type[T], arguments: Sequence[str], verb: str) -> T:
    """A dataclass of options from the command line. In lists of numbers, commas work as well as blanks.

    Groups of options in it are flat. ``--config FILE``, where there is such an option, stands for the flags of a
    recipe; all others win over it.

    Wrong flags end the process with exit code 2 and a message (tyro's). ValueError comes from the dataclass itself, for
    ``main`` to make one line of: inside tyro it would become a box of several.
    """
    fields = options_of(kind)
    lists = {flag(name) for name, field in fields.items() if "tuple" in str(field.type)}
    words = _split_lists(arguments, lists)
    if "config" in fields:
        words = [*_recipes(words, kind), *words]
    found = tyro.cli(_unchecked(kind), args=words, prog=f"ecar {verb}", config=(tyro.conf.OmitArgPrefixes,))
    return _checked(kind, found)


def _unchecked(kind: type) -> type:
    """The same dataclass without its checks, nor those of its groups."""
    hints = typing.get_type_hints(kind)
    own = {f.name: hints[f.name] for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])}
    groups = {name: _unchecked(typing.cast(type, group)) for name, group in own.items()}
    body: dict[str, Any] = {"__post_init__": lambda _: None, "__doc__": kind.__doc__, "__annotations__": groups}
    for field in dataclasses.fields(kind):
        if field.name in groups:
            optional = field.default_factory is not dataclasses.MISSING
            made = {"default_factory": groups[field.name]} if optional else {}
            body[field.name] = dataclasses.field(**made)
    return dataclasses.dataclass(frozen=True, kw_only=True)(type(kind.__name__, (kind,), body))


def _checked(kind: type[T], found: Any) -> T:
    """The values of an unchecked one, checked."""
    hints = typing.get_type_hints(kind)
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{n: _checked(hints[n], v) if dataclasses.is_dataclass(v) else v for n, v in values.items()})


def _recipes(words: list[str], kind: type) -> list[str]:
    """The flags that every ``--config`` stands for."""
    given = [after for word, after in pairwise(words) if word == "--config"]
    given += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return [word for file in given for word in recipe_flags(Path(file).expanduser(), kind)]


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


def output_file(out: str, suffixes: Sequence[str], flag: str = "--out") -> Path:
    """An output path, checked before work starts.

    Raises:
        ValueError: unknown suffix, missing or unwritable folder.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {out}: the name must end in {' or '.join(suffixes)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {out}: cannot write there ({error.strerror})") from None
    return path


def one_or_all(values: tuple[Number, ...] | None) -> tuple[Number, ...] | Number | None:
    """A list of one number as that number: it stands for every stage."""
    return values[0] if values is not None and len(values) == 1 else values


def check_dtype(name: str) -> None:
    """ValueError unless ``name`` is fp32 or bf16; torch is not imported."""
    if name not in _DTYPES:
        raise ValueError(f"--dtype must be fp32 or bf16, got {name!r}")


def check_critic(critic: str | None, candidates: int, acceptance: float | None) -> None:
    """ValueError for a critic that has nothing to choose from, or an acceptance that is none."""
    if acceptance is not None:
        check_acceptance(acceptance, candidates, "--")
    if critic is not None and candidates == 1:
        raise ValueError("--critic chooses among candidates: give --candidates 2 or more, or leave it out")


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
