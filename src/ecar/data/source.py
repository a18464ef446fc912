"""Where images come from: a folder, parquet files or a Hub data set, all through ``datasets``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecar.data.images import BadImageError, decode_image, fit

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"}
_BAD_SHARE_LIMIT = 0.1
_SPLITS = {"train", "training", "test", "val", "valid", "validation", "dev"}


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A table of encoded images.

    Attributes:
        name: what the user asked for, for messages and records.
        table: a ``datasets.Dataset`` whose image column is not decoded (bytes or path).
        image_column: name of that column.
        labels: class of each row, (N,) int64; all zero when the data has no labels.
        class_names: one name per class; empty when the data has no labels.
    """

    name: str
    table: Any
    image_column: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        """Encoded bytes of one row."""
        cell = self.table[index][self.image_column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise BadImageError("is empty")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def path(self, index: int) -> str:
        """Path of one row's file, or its row number, for messages."""
        cell = self.table[index][self.image_column] or {}
        return str(cell.get("path") or f"row {index}")


@dataclass(kw_only=True)
class ImageReport:
    """What happened while reading: rows used and rows skipped with the reason."""

    used: int = 0
    skipped: list[str] | None = None


def load_source(data: str, *, split: str = "train", max_images: int | None = None) -> ImageSource:
    """Open ``data``: a folder of images (class subfolders give labels), a parquet file or folder, or a Hub id.

    Raises:
        ValueError: nothing there, no image column, or labels out of range.
    """
    table, names = _open(data, split)
    if max_images is not None and max_images < len(table):
        # Not the first ones: folders are sorted by class.
        chosen = np.random.default_rng(0).choice(len(table), max_images, replace=False)
        table = table.select(np.sort(chosen))
    if len(table) == 0:
        raise ValueError(f"{data}: no images found")
    from datasets import ClassLabel, Image

    images = [c for c, f in table.features.items() if isinstance(f, Image)]
    if not images:
        raise ValueError(f"{data}: no image column among {list(table.features)}")
    table = table.cast_column(images[0], Image(decode=False))
    label_column = next((c for c in ("label", "labels", "fine_label", "class") if c in table.features), None)
    if label_column is None:
        return ImageSource(
            name=data, table=table, image_column=images[0], labels=np.zeros(len(table), np.int64), class_names=()
        )
    feature, column = table.features[label_column], list(table[label_column])
    if any(value is None for value in column):
        raise ValueError(f"{data}: row {column.index(None)} has no label; remove such rows, or the label column")
    if not all(isinstance(value, int | str) for value in column):
        raise ValueError(f"{data}: column {label_column} holds {type(column[0]).__name__}, not class ids or names")
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    elif not names:  # ids or names as they come: the classes are the different values
        values = sorted(set(column), key=lambda value: natural_key(str(value)))
        names, places = tuple(str(v) for v in values), {v: i for i, v in enumerate(values)}
        column = [places[value] for value in column]
    labels = np.asarray(column, dtype=np.int64)
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"{data}: label {labels.min()}..{labels.max()} outside the {len(names)} classes")
    return ImageSource(name=data, table=table, image_column=images[0], labels=labels, class_names=names)


def iterate_images(
    source: ImageSource, height: int, width: int, *, batch_size: int, report: ImageReport
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (images (B, height, width, 3) uint8, labels (B,) int64), in row order.

    Bad images are skipped and listed in ``report``; more than a tenth of bad ones is an error.

    Raises:
        ValueError: too many bad images.
    """
    report.used, report.skipped = 0, []
    images: list[np.ndarray] = []
    labels: list[int] = []
    for index in range(len(source)):
        try:
            images.append(fit(decode_image(source.read(index)), height, width))
            labels.append(int(source.labels[index]))
            report.used += 1
        except (BadImageError, OSError) as error:
            report.skipped.append(f"{source.path(index)}: {error}")
            if len(report.skipped) > max(5, _BAD_SHARE_LIMIT * len(source)):
                raise ValueError(
                    f"{source.name}: {len(report.skipped)} bad images of the first {index + 1}; "
                    f"the last: {report.skipped[-1]}"
                ) from error
        if len(images) == batch_size:
            yield np.stack(images), np.asarray(labels)
            images, labels = [], []
    if images:
        yield np.stack(images), np.asarray(labels)
    if report.used == 0:
        raise ValueError(f"{source.name}: no usable image; {'; '.join(report.skipped)}")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "class2" before "class10"."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p.lower()) for p in re.split(r"(\d+)", name) if p]


def _open(data: str, split: str) -> tuple[Any, tuple[str, ...]]:
    """The raw table, and class names where the folder structure gives them."""
    from datasets import Dataset, load_dataset

    path = Path(data).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return Dataset.from_parquet(str(path)), ()
    if path.is_dir():
        parquet = sorted(path.rglob("*.parquet"))
        if parquet:
            return Dataset.from_parquet([str(p) for p in _of_split(parquet, path, split)]), ()
        return _open_folder(path)
    if path.exists():
        raise ValueError(f"{data}: not a folder, a .parquet file or a Hub data set id")
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise ValueError(f"{data}: no such file or folder (a Hub data set id has the form owner/name)")
    try:
        return load_dataset(data, split=split), ()
    except Exception as error:
        raise ValueError(f"{data}: no such folder, and the Hub answered: {type(error).__name__}: {error}") from error


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """The files of a split, by the names of files and folders; all of them where no name mentions any split."""

    def parts(file: Path) -> set[str]:
        return {word for part in file.relative_to(root).parts for word in re.split(r"[^a-z0-9]+", part.lower())}

    chosen = [f for f in files if split.lower() in parts(f)]
    if not chosen and any(parts(f) & _SPLITS for f in files):
        raise ValueError(f"{root}: no parquet file of the split {split!r} among {', '.join(f.name for f in files[:5])}")
    return chosen or files


def _open_folder(path: Path) -> tuple[Any, tuple[str, ...]]:
    """A folder of images; the first level of subfolders, if any, names the classes (natural order)."""
    from datasets import Dataset, Features, Image, Value

    files = sorted((p for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES and p.is_file()), key=_file_key)
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise ValueError(f"{path}: no images found (looked for {', '.join(sorted(_IMAGE_SUFFIXES))})")
    rows: dict[str, list[Any]] = {"image": [{"bytes": None, "path": str(p)} for p in files]}
    features = {"image": Image(decode=False)}
    tops = {p.relative_to(path).parts[0] for p in files if len(p.relative_to(path).parts) > 1}
    names: tuple[str, ...] = ()
    if tops:
        loose = [p for p in files if p.parent == path]
        if loose:
            raise ValueError(f"{path}: has class subfolders and loose images (such as {loose[0].name}); move those")
        if {top.lower() for top in tops} <= _SPLITS:
            raise ValueError(
                f"{path}: holds the splits {', '.join(sorted(tops))}, not classes; give one of those folders"
            )
        names = tuple(sorted(tops, key=natural_key))
        rows["label"] = [names.index(p.relative_to(path).parts[0]) for p in files]
        features["label"] = Value("int64")
    table = Dataset.from_dict(rows, features=Features(features))
    return table.cast_column("image", Image(decode=False)), names


def _file_key(path: Path) -> list[tuple[int, int, str]]:
    return natural_key(str(path))
