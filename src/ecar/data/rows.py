"""Rows of encoded images: how many, their bytes, their names. Nothing is decoded here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
    """Random access to encoded images."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Encoded bytes of a row; BadImageError or OSError for a row without any."""

    def path(self, index: int) -> str:
        """Where the row is, for messages."""

    def state(self) -> list[str]:
        """What changes when the data do: names, sizes and times of files, or a fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Rows and what the data say of them.

    Attributes:
        rows: the images.
        labels: of each, as the data have them (ids or names); None: no labels.
        class_names: names of the classes where the data say them.
        empty_classes: classes without a single image that the data name.
        note: where images and labels were found, in words.
        left_out: names of what is there and not read, by reason.
    """

    rows: Rows
    labels: Sequence[Any] | None
    class_names: tuple[str, ...] = ()
    empty_classes: tuple[str, ...] = ()
    note: str = ""
    left_out: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class FolderRows:
    """Image files under ``root``."""

    root: Path
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index].read_bytes()

    def path(self, index: int) -> str:
        return printable(str(self.files[index]))

    def state(self) -> list[str]:
        return [f"{printable(file.relative_to(self.root).as_posix())} {file_state(file)}" for file in self.files]


def choose_rows(total: int, count: int | None) -> np.ndarray:
    """``count`` of ``total`` rows at random, ascending, always the same ones; all where that is not fewer. Not the
    first ones: folders are sorted by class. ValueError for fewer than one."""
    if count is not None and count < 1:
        raise ValueError(f"the number of images must be at least 1, got {count}")
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False))


def file_state(file: Path) -> str:
    """Size and time of a file: another text when it is written to or replaced."""
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "class2" before "class10"; names that differ in case only have an order too."""
    parts = [(0, int(p), "") if p.isdecimal() else (1, 0, p.lower()) for p in re.split(r"(\d+)", name) if p]
    return [*parts, (-1, 0, name)]


def printable(name: str) -> str:
    r"""A file name that is not UTF-8 with its odd bytes as ``\xNN``: it can be printed, compared and stored."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
