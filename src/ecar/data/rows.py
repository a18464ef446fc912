"""Rows of encoded images in a folder or a table: how many, their bytes, their names. Nothing is decoded here."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ecar.files.images import BadImageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"}
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
SPLITS = {"train", "training", "test", "val", "valid", "validation", "dev"}


class Rows(Protocol):
    """Random access to encoded images."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Encoded bytes of a row; BadImageError or OSError for a row without any."""

    def path(self, index: int) -> str:
        """Where the row is, for messages."""

    def id(self, index: int) -> str:
        """A name of the row that stays the same wherever the data are moved."""

    def state(self) -> list[str]:
        """What changes when the data do: names, sizes and times of files, or a fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Rows, their labels as the data have them (ids or names; None: no labels), the names of the classes where the
    data say them, and classes without a single image that the data name."""

    rows: Rows
    labels: list[int | str] | None
    class_names: tuple[str, ...] = ()
    empty_classes: tuple[str, ...] = ()


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

    def id(self, index: int) -> str:
        return printable(self.files[index].relative_to(self.root).as_posix())

    def state(self) -> list[str]:
        return [f"{self.id(i)} {file_state(file)}" for i, file in enumerate(self.files)]


@dataclass(frozen=True)
class TableRows:
    """A ``datasets.Dataset`` whose image column is not decoded (bytes or path), of ``files`` where it has some."""

    table: Any
    column: str
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        return cell_bytes(self.table[index][self.column])

    def path(self, index: int) -> str:
        cell = self.table[index][self.column] or {}
        return str(cell.get("path") or f"row {index}")

    def id(self, index: int) -> str:
        return f"row-{index}"

    def state(self) -> list[str]:
        return [f"{f.name} {file_state(f)}" for f in self.files] or [str(self.table._fingerprint)]


def cell_bytes(cell: dict[str, Any] | None) -> bytes:
    """Of an image column that is not decoded: bytes in the table, or in a file of their own, maybe on the Hub.

    Raises:
        BadImageError: neither.
        OSError: the file cannot be read.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadImageError("is empty")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    import fsspec

    with fsspec.open(cell["path"], "rb") as file:
        return bytes(file.read())


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


def open_table(table: Any, data: str, files: tuple[Path, ...] = ()) -> Opened:
    """A ``datasets.Dataset``, read from ``files`` if it was, as rows. Raises ValueError without an image column."""
    from datasets import ClassLabel, Image

    images = [c for c, f in table.features.items() if isinstance(f, Image)]
    if not images:
        raise ValueError(f"{data}: no image column among {list(table.features)}")
    rows = TableRows(table.cast_column(images[0], Image(decode=False)), images[0], files)
    label_column = next((c for c in LABEL_COLUMNS if c in table.features), None)
    if label_column is None:
        return Opened(rows=rows, labels=None)
    feature = table.features[label_column]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    return Opened(rows=rows, labels=list(table[label_column]), class_names=names)


def open_folder(root: Path) -> Opened:
    """A folder of images; the first level of subfolders, if any, names the classes (natural order).

    Raises:
        ValueError: no images, class folders beside loose images, or folders of splits.
    """
    files, tops = _walk(root)
    if not files:
        raise ValueError(f"{root}: no images found (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    rows = FolderRows(root, tuple(files))
    used = {p.relative_to(root).parts[0] for p in files if p.parent != root}
    if not used:
        return Opened(rows=rows, labels=None)
    loose = [p for p in files if p.parent == root]
    if loose:
        raise ValueError(f"{root}: has class subfolders and loose images (such as {loose[0].name}); move those")
    if {top.lower() for top in used} <= SPLITS:
        raise ValueError(f"{root}: holds the splits {', '.join(sorted(used))}, not classes; give one of those folders")
    empty = tuple(sorted(map(printable, tops - used), key=natural_key))
    if empty:
        print(f"{root}: folders without images are no classes: {', '.join(empty)}", file=sys.stderr)
    names = sorted(used, key=natural_key)
    places = {name: i for i, name in enumerate(names)}
    labels: list[int | str] = [places[p.relative_to(root).parts[0]] for p in files]
    return Opened(rows=rows, labels=labels, class_names=tuple(map(printable, names)), empty_classes=empty)


def image_files(root: Path) -> list[Path]:
    """Image files under ``root`` in natural order; hidden names are left out."""
    return _walk(root)[0]


def _walk(root: Path) -> tuple[list[Path], set[str]]:
    """Image files under ``root`` in natural order, and the names of its subfolders; hidden names are left out.

    Links to folders are followed, but every real folder is read once, where it is if that is under ``root``: a loop of
    links ends. Links to files that are not there are images that cannot be read.
    """
    files: list[Path] = []
    tops: set[str] = set()
    seen: dict[tuple[int, int], str] = {}
    places = [root]  # and then links to folders, after all that is no link
    for place in places:
        for folder, subfolders, names in os.walk(place):
            status = os.stat(folder)
            before = seen.setdefault((status.st_dev, status.st_ino), folder)
            if before != folder:
                print(f"{printable(folder)}: the same folder as {printable(before)}, read once", file=sys.stderr)
                subfolders.clear()
                continue
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            places += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
            tops |= set(subfolders) if Path(folder) == root else set()
            shown = (Path(folder, name) for name in names if not name.startswith("."))
            images = (file for file in shown if file.suffix.lower() in IMAGE_SUFFIXES)
            files += [file for file in images if file.is_file() or file.is_symlink()]
    return sorted(files, key=lambda file: natural_key(str(file.relative_to(root)))), tops


def of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """The files of a split, by the names of files and folders; all of them where no name mentions any split.

    Raises:
        ValueError: other splits are mentioned, this one is not.
    """

    def parts(file: Path) -> set[str]:
        """Words with their digits and without: ``train0.parquet`` is of the split train."""
        names = [part.lower() for part in file.relative_to(root).parts]
        return {word for name in names for letters in ("[^a-z0-9]+", "[^a-z]+") for word in re.split(letters, name)}

    chosen = [f for f in files if split.lower() in parts(f)]
    if not chosen and any(parts(f) & SPLITS for f in files):
        kind = files[0].suffix.removeprefix(".")
        raise ValueError(f"{root}: no {kind} file of the split {split!r} among {', '.join(f.name for f in files[:5])}")
    return chosen or files


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "class2" before "class10"; names that differ in case only have an order too."""
    parts = [(0, int(p), "") if p.isdecimal() else (1, 0, p.lower()) for p in re.split(r"(\d+)", name) if p]
    return [*parts, (-1, 0, name)]


def printable(name: str) -> str:
    r"""A file name that is not UTF-8 with its odd bytes as ``\xNN``: it can be printed, compared and stored."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
