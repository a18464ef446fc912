"""Which columns of a table are images and labels, whoever wrote the table; a cell as encoded bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ecar.data.formats import IMAGE_SUFFIXES, is_image
from ecar.data.labels import choose_label
from ecar.data.reading import ReadOptions
from ecar.files.images import BadImageError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values", "images", "pixels")
_PATH_COLUMNS = ("file_name", "filename", "path", "file_path", "filepath", "image_path", "img_path", "file")
PICTURES, BYTES, TEXT = "images", "bytes", "text"  # kinds of columns that may be images


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        image: of the images.
        label: of the labels; None: unlabelled.
        class_names: where the label column names its classes.
        note: the choice in words.
    """

    image: str
    label: str | None
    class_names: tuple[str, ...] = ()
    note: str = ""


def choose_columns(
    kinds: Mapping[str, str],
    classes: Mapping[str, tuple[str, ...]],
    peek: Callable[[str], Sequence[Any]],
    read: ReadOptions,
    where: str,
    folders: Sequence[Path] = (),
) -> Columns | None:
    """The columns to read; None without a column of images.

    Args:
        kinds: every column with its kind; any word for those that are no images.
        classes: class names of the columns that have them.
        peek: some values of a column that are not null.
        read: the columns that were asked for.
        where: the data, for messages.
        folders: where relative paths may begin; without any, no column of paths is found by itself.

    Raises:
        ValueError: a column that is not there or holds no images, or several that may be meant.
    """
    image = _choose_image(kinds, peek, read.image_column, where, folders)
    if image is None:
        return None
    pictures = [c for c, kind in kinds.items() if kind == PICTURES or c == image]
    label = choose_label(list(kinds), read.label_column, where, named=classes, never=pictures)
    if label in pictures:
        raise ValueError(f"{where}: the column {label!r} holds images, not labels")
    labels = f"labels: column {label}" if label else f"no column of labels among {', '.join(kinds)}"
    names = classes.get(label, ()) if label else ()
    rest = [column for column in pictures if column != image]
    others = f" (not {', '.join(rest)})" if rest else ""
    return Columns(image=image, label=label, class_names=names, note=f"images: column {image}{others}; {labels}")


def _choose_image(
    kinds: Mapping[str, str],
    peek: Callable[[str], Sequence[Any]],
    asked: str | None,
    where: str,
    folders: Sequence[Path],
) -> str | None:
    if asked is not None:
        if asked not in kinds:
            raise ValueError(f"{where}: no column {asked!r} for --image-column among {', '.join(kinds)}")
        if kinds[asked] not in (PICTURES, BYTES, TEXT):
            raise ValueError(f"{where}: the column {asked!r} holds {kinds[asked]}, not images, their bytes or paths")
        if kinds[asked] == TEXT and any("://" in str(value) for value in peek(asked)):
            raise ValueError(f"{where}: the column {asked!r} holds addresses; download the images first")
        return asked
    found = [
        column
        for column, kind in kinds.items()
        if kind == PICTURES or (kind == BYTES and any(is_picture(value) for value in peek(column)))
    ]
    order: tuple[str, ...] = IMAGE_COLUMNS
    if not found:
        order = (*IMAGE_COLUMNS, *_PATH_COLUMNS)
        found = [c for c, kind in kinds.items() if kind == TEXT and _are_paths(peek(c), folders)]
    usual = {c.lower(): c for c in reversed(found)}
    best = next((usual[name] for name in order if name in usual), None)
    if best is None and len(found) > 1:
        raise ValueError(f"{where}: {', '.join(found)} may each be the images; name one with --image-column")
    return best or (found[0] if found else None)


def is_picture(value: bytes) -> bool:
    """Whether these bytes begin as an image that Pillow reads."""
    return is_image("", io.BytesIO(value))


def _are_paths(values: Sequence[str], folders: Sequence[Path]) -> bool:
    """Whether all look like images' names, and a file of at least one is there."""
    like = [PurePath(value).suffix.lower() in IMAGE_SUFFIXES and "://" not in value for value in values]
    return bool(like) and all(like) and any((folder / value).is_file() for folder in folders for value in values)


def cell_bytes(cell: Any, folders: Sequence[Path] = ()) -> bytes:
    """Of an image column that is not decoded: bytes in the table, or in a file of their own.

    Args:
        cell: bytes, a path, or a mapping with "bytes" and "path", one of which may lack.
        folders: where relative paths may begin.

    Raises:
        BadImageError: neither.
        OSError: the file cannot be read.
    """
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    path = cell_path(cell)
    if path is None:
        raise BadImageError("is empty")
    places = [file for folder in folders if (file := folder / path).exists()] or [Path(path)]
    return places[0].read_bytes()


def cell_path(cell: Any) -> str | None:
    """The path in a cell, if it has one."""
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    return path if isinstance(path, str) and path else None
