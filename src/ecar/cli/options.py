"""Flags from dataclasses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], verb: str) -> T:
    """A dataclass of options from the command line. Commas in lists of numbers work as well as blanks.

    Wrong flags end the process with exit code 2 and a message (tyro's); ValueError comes from the dataclass itself.
    """
    return tyro.cli(kind, args=_split_lists(arguments), prog=f"ecar {verb}", config=(tyro.conf.OmitArgPrefixes,))


def _split_lists(arguments: Sequence[str]) -> list[str]:
    """``--steps 8,8`` -> ``--steps 8 8``; only values that are lists of numbers are split."""
    result: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if re.fullmatch(r"-?[\d.]+(,-?[\d.]+)+", value):
            result += ([flag] if equals else []) + value.split(",")
        else:
            result.append(argument)
    return result


def output_file(out: str, suffixes: Sequence[str]) -> Path:
    """An output path, checked before work starts.

    Raises:
        ValueError: unknown suffix, missing or unwritable folder.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--out {out}: the name must end in {' or '.join(suffixes)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{out}: cannot write there ({error.strerror})") from None
    return path
