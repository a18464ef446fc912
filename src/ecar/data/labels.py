"""Labels: which column has them, side files of image folders that list them, and class ids from what the data say."""

from __future__ import annotations

import csv
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ecar.data.reading import ReadOptions, shortened
from ecar.data.rows import natural_key

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_MORE_LABEL_COLUMNS = (
    *("target", "category", "class_name", "class_label", "class_id", "classname", "label_name", "label_id"),
    *("label_text", "target_name", "category_name", "category_id", "cls"),
)
SIDE_FILES = ("dataset.json", "metadata.jsonl", "metadata.csv")
_PATH_COLUMN = "file_name"


def choose_label(
    columns: Sequence[str], asked: str | None, where: str, named: Iterable[str] = (), never: Iterable[str] = ()
) -> str | None:
    """The column of the labels; None where nothing looks like one.

    Args:
        columns: all there are.
        asked: ``--label-column``.
        where: the data, for messages.
        named: columns that name their classes (``ClassLabel``).
        never: columns that are no labels whatever their name, such as images.

    Raises:
        ValueError: no such column, or several that may be meant.
    """
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{where}: no column {asked!r} for --label-column among {', '.join(columns)}")
        return asked
    free = {c.lower(): c for c in reversed(columns) if c not in set(never)}
    usual = next((free[name] for name in LABEL_COLUMNS if name in free), None)
    if usual is not None:
        return usual
    found = [c for c in columns if c in set(named)] or [c for c in free.values() if c.lower() in _MORE_LABEL_COLUMNS]
    if len(found) > 1:
        raise ValueError(f"{where}: {', '.join(sorted(found))} may each be the labels; name one with --label-column")
    return found[0] if found else None


def class_ids(column: Sequence[Any], names: tuple[str, ...], data: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as the data have them -> class ids (N,) int64 and class names (NFC); without names, the classes are the
    different values in natural order.

    Raises:
        ValueError: a missing label, or one that is no class.
    """
    column, names = [as_label(value) for value in column], tuple(map(nfc, names))
    if None in column:
        raise ValueError(f"{data}: row {column.index(None)} has no label; remove such rows, or the label column")
    odd = next((value for value in column if not isinstance(value, int | str)), None)
    if odd is not None:
        raise ValueError(f"{data}: the labels are of type {type(odd).__name__}, not class ids or names")
    if not names:
        values = sorted(set(column), key=lambda value: natural_key(str(value)))
        names, places = tuple(str(v) for v in values), {v: i for i, v in enumerate(values)}
    else:
        places = {**{name: i for i, name in enumerate(names)}, **{i: i for i in range(len(names))}}
    outside = next((i for i, value in enumerate(column) if value not in places), None)
    if outside is not None:
        raise ValueError(f"{data}: label {column[outside]!r} of row {outside} is none of the {len(names)} classes")
    return np.asarray([places[value] for value in column], dtype=np.int64), names


def nfc(name: str) -> str:
    """A name with its accents composed: macOS writes them apart from their letters."""
    return unicodedata.normalize("NFC", name)


def as_label(value: Any) -> Any:
    """A label as other libraries write it, as a class id or name: pandas makes 3.0 and NaN of ids where some lack."""
    if isinstance(value, str):
        return nfc(value)
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, bytes):
        try:
            return nfc(value.decode("utf-8").strip())
        except UnicodeDecodeError:
            return value
    return value


def as_id(label: int | str | None) -> int | str | None:
    """A label that is a number written out as that number: "7", but not "07", which may be a name beside "7"."""
    return int(label) if isinstance(label, str) and label.isdecimal() and str(int(label)) == label else label


@dataclass(frozen=True, kw_only=True)
class SideLabels:
    """Labels that side files of a folder give.

    Attributes:
        labels: one per image; None: the side file says that there are none.
        source: the files, in words.
        left_out: files that are named there and are not among the images; side files without labels.
    """

    labels: list[int | str] | None
    source: str
    left_out: dict[str, list[str]] = field(default_factory=dict)


def side_labels(root: Path, images: Sequence[Path], sides: Sequence[Path], read: ReadOptions) -> SideLabels | None:
    """Labels of ``images`` from ``dataset.json`` (StyleGAN, EDM), ``metadata.jsonl`` or ``metadata.csv`` files under
    ``root``; None where no such file has any.

    Raises:
        ValueError: damaged files, two kinds at once, images without a label there, or no such column.
    """
    found: dict[str, dict[str, Any] | None] = {}
    without: list[str] = []
    for side in sides:
        name = side.relative_to(root).as_posix()
        table = _dataset_json(side) if side.name == "dataset.json" else _metadata(side, read)
        if table is _NOTHING:
            without.append(name)
        else:
            inside = side.parent.relative_to(root)
            found[name] = None if table is None else {nfc((inside / k).as_posix()): v for k, v in table.items()}
    if not found:
        if read.label_column is not None:
            raise ValueError(f"--label-column: no {', '.join(SIDE_FILES)} in {root} has columns; leave it out")
        return None
    if len({Path(name).name for name in found}) > 1:
        raise ValueError(f"{root}: {' and '.join(found)} both give labels; move one of them")
    tables = [table for table in found.values() if table is not None]
    left_out = {"side files without labels": without} if without else {}
    if not tables:
        return SideLabels(labels=None, source=f"none, as {', '.join(found)} says", left_out=left_out)
    places = {nfc(image.relative_to(root).as_posix()): i for i, image in enumerate(images)}
    labels: list[Any] = [None] * len(images)
    gone = []
    for table in tables:
        for name, label in table.items():
            if name in places:
                labels[places[name]] = label
            else:
                gone.append(name)
    bare = [name for name, i in places.items() if labels[i] is None]
    if bare:
        raise ValueError(
            f"{root}: {shortened(sorted(found), 3)} has no label for {len(bare):,} of {len(images):,} images, such as "
            f"{shortened(bare, 3)}; add them, or move these images"
        )
    if gone:
        left_out["named in a side file, but not there"] = gone
    return SideLabels(labels=labels, source=shortened(sorted(found), 3), left_out=left_out)


_NOTHING: dict[str, Any] = {}


def _dataset_json(side: Path) -> dict[str, Any] | None:
    """File -> label; None where it says that there are no labels; ``_NOTHING`` where it is another kind of file."""
    try:
        record = json.loads(side.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{side}: cannot be read ({error}); mend it, or move it away") from None
    if not isinstance(record, dict) or "labels" not in record:
        return _NOTHING
    listed = record["labels"]
    if not listed:
        return None
    try:
        pairs = listed.items() if isinstance(listed, dict) else [(name, label) for name, label in listed]
        return {_tidy(name): label for name, label in pairs}
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f'{side}: "labels" must be a list of [file, class] pairs') from None


def _metadata(side: Path, read: ReadOptions) -> dict[str, Any]:
    """File -> label of ``metadata.jsonl`` or ``metadata.csv``; ``_NOTHING`` without a column of labels."""
    rows = list(_csv_rows(side) if side.suffix == ".csv" else _json_rows(side))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if _PATH_COLUMN not in columns:
        if read.label_column is None and choose_label(columns, None, str(side)) is None:
            return _NOTHING
        raise ValueError(f"{side}: no column {_PATH_COLUMN} among {', '.join(columns)}")
    chosen = choose_label(columns, read.label_column, str(side), never=[_PATH_COLUMN])
    if chosen is None:
        return _NOTHING
    table: dict[str, Any] = {}
    for number, row in enumerate(rows):
        name, label = row.get(_PATH_COLUMN), row.get(chosen)
        label = as_id(label) if side.suffix == ".csv" else label
        if not isinstance(name, str) or not name:
            raise ValueError(f"{side}: row {number} has no {_PATH_COLUMN}")
        if label is None or label == "":
            raise ValueError(f"{side}: row {number} ({name}) has no {chosen}; add it, or remove the row")
        if table.setdefault(_tidy(name), label) != label:
            raise ValueError(f"{side}: {name} has two labels, {table[_tidy(name)]!r} and {label!r}")
    return table


def _tidy(name: str) -> str:
    """A path as StyleGAN's tool on Windows or a shell's ``./`` writes it, as the folder has it."""
    return Path(name.replace("\\", "/")).as_posix()


def _csv_rows(side: Path) -> Iterable[Mapping[str, Any]]:
    try:
        with open(side, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            comma = max(",;\t", key=head.count)  # as spreadsheets write them in other languages
            for row in csv.DictReader(file, delimiter=comma, skipinitialspace=True):
                yield {key: value for key, value in row.items() if key is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{side}: cannot be read ({error}); mend it, or move it away") from None


def _json_rows(side: Path) -> Iterable[Mapping[str, Any]]:
    with open(side, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{side}: line {number + 1} cannot be read ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{side}: line {number + 1} is no object")
            yield row
