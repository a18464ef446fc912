"""Where images come from: a folder, WebDataset tars, parquet files or a Hub data set, all with random access."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ecar.data.ahead import in_order
from ecar.data.rows import Opened, Rows, choose_rows, image_files, natural_key, of_split, open_folder, open_table
from ecar.data.tars import find_tars, open_tars
from ecar.files.images import BadImageError, decode_image, fit
from ecar.files.remote import hub_reason

__all__ = ["BadImages", "ImageReport", "ImageSource", "iterate_images", "load_source", "natural_key"]

_FEW = 5


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A table of encoded images.

    Attributes:
        name: what the user asked for, for messages and records.
        rows: the encoded images of the whole data set.
        chosen: the rows of it that are used, (N,) int64, ascending.
        labels: class of each, (N,) int64; all zero when the data has no labels.
        class_names: one name per class; empty when the data has no labels.
        empty_classes: classes that the data name without an image; not among ``class_names`` where a folder has them.
    """

    name: str
    rows: Rows
    chosen: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    empty_classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes:
        """Encoded bytes of one image."""
        return self.rows.read(int(self.chosen[index]))

    def encoded(self, start: int = 0) -> Iterator[tuple[int, bytes | BadImageError]]:
        """Every index from ``start`` on with its bytes, or with why they cannot be read."""
        for index in range(start, len(self)):
            try:
                yield index, self.read(index)
            except BadImageError as error:
                yield index, error
            except OSError as error:
                yield index, BadImageError(str(error))

    def path(self, index: int) -> str:
        """Path of one image's file, or its row number, for messages."""
        return self.rows.path(int(self.chosen[index]))

    def id(self, index: int) -> str:
        """A stable name of one image."""
        return self.rows.id(int(self.chosen[index]))


@dataclass(kw_only=True)
class ImageReport:
    """What happened while reading: images used, images skipped with the reason, and what was read (``content``)."""

    used: int = 0
    skipped: list[str] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

    def read(self, data: bytes | BadImageError, label: int) -> None:
        """Note the next image, good or bad."""
        encoded = b"" if isinstance(data, BadImageError) else data
        self._digest.update(f"{label} {len(encoded)} ".encode())
        self._digest.update(encoded)

    def name_skipped(self) -> None:
        """A line on stderr for each skipped image."""
        for line in self.skipped:
            print(f"skipped {line}", file=sys.stderr)

    @property
    def content(self) -> str:
        """A fingerprint of the images read so far, their order and labels; the same wherever the files lie."""
        return str(self._digest.hexdigest()[:16])


@dataclass(frozen=True, kw_only=True)
class BadImages:
    """What to do about images that cannot be read.

    Attributes:
        stop: end at the first one.
        max_share: end when more than this share is bad; up to five are let pass, unless it is 0.
    """

    stop: bool = False
    max_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"the share of bad images must be in [0, 1], got {self.max_share}")

    def check(self, name: str, skipped: list[str], seen: int, total: int) -> None:
        """ValueError where ``skipped``, found among the first ``seen`` of ``total`` images, are too many."""
        if skipped and self.stop:
            raise ValueError(f"{name}: a bad image: {skipped[-1]}")
        if len(skipped) > max(_FEW if self.max_share else 0, self.max_share * total):
            raise ValueError(f"{name}: {len(skipped)} bad images of the first {seen}; the last: {skipped[-1]}")


def load_source(data: str, *, split: str = "train", max_images: int | None = None) -> ImageSource:
    """Open ``data``: a folder of images (class subfolders give labels), WebDataset tars (folder, file, or pattern
    with braces or stars), a parquet file or folder, or a Hub id.

    Raises:
        ValueError: nothing there, no images, or labels out of range.
    """
    opened = _open(data, split)
    total = len(opened.rows)
    if total == 0:
        raise ValueError(f"{data}: no images found")
    names, labels = opened.class_names, np.zeros(total, np.int64)
    if opened.labels is not None:
        labels, names = class_ids(opened.labels, names, data)
    chosen = choose_rows(total, max_images)
    return ImageSource(
        name=data,
        rows=opened.rows,
        chosen=chosen,
        labels=labels[chosen],
        class_names=names,
        empty_classes=opened.empty_classes,
    )


def class_ids(column: list[int | str], names: tuple[str, ...], data: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as the data have them -> class ids (N,) int64 and class names; without names, the classes are the
    different values in natural order.

    Raises:
        ValueError: a missing label, or one that is no class.
    """
    if None in column:
        raise ValueError(f"{data}: row {column.index(None)} has no label; remove such rows, or the label column")  # type: ignore[arg-type]
    if not all(isinstance(value, int | str) for value in column):
        raise ValueError(f"{data}: the labels are of type {type(column[0]).__name__}, not class ids or names")
    if not names:
        values = sorted(set(column), key=lambda value: natural_key(str(value)))
        names, places = tuple(str(v) for v in values), {v: i for i, v in enumerate(values)}
    else:
        places = {**{name: i for i, name in enumerate(names)}, **{i: i for i in range(len(names))}}
    outside = next((i for i, value in enumerate(column) if value not in places), None)
    if outside is not None:
        raise ValueError(f"{data}: label {column[outside]!r} of row {outside} is none of the {len(names)} classes")
    return np.asarray([places[value] for value in column], dtype=np.int64), names


def iterate_images(
    source: ImageSource,
    height: int,
    width: int,
    *,
    batch_size: int,
    report: ImageReport,
    bad: BadImages | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (images (B, height, width, 3) uint8, labels (B,) int64), in row order.

    Bad images are skipped and listed in ``report``, as far as ``bad`` (default: up to a tenth) lets them pass. The
    others keep their order and their labels.

    Raises:
        ValueError: too many bad images, or none that is good.
    """
    bad = bad or BadImages()
    images: list[np.ndarray] = []
    labels: list[int] = []

    def pixels(encoded: tuple[int, bytes | BadImageError]) -> np.ndarray:
        return fit(decode_image(encoded[1]), height, width)

    for (index, encoded), result in in_order(pixels, source.encoded()):
        report.read(encoded, int(source.labels[index]))
        if isinstance(result, BadImageError):
            report.skipped.append(f"{source.path(index)}: {result}")
            bad.check(source.name, report.skipped, index + 1, len(source))
        else:
            images.append(result)
            labels.append(int(source.labels[index]))
            report.used += 1
        if len(images) == batch_size:
            yield np.stack(images), np.asarray(labels)
            images, labels = [], []
    if images:
        yield np.stack(images), np.asarray(labels)
    if report.used == 0:
        raise ValueError(f"{source.name}: no usable image; {'; '.join(report.skipped)}")


def _open(data: str, split: str) -> Opened:
    path = Path(data).expanduser()
    if path.is_dir():
        for suffix in (".parquet", ".tar"):
            if files := find_files(path, suffix, split):
                if loose := image_files(path):
                    raise ValueError(
                        f"{data}: holds archives (such as {files[0].relative_to(path)}) and images (such as "
                        f"{loose[0].relative_to(path)}); give one kind, or move the other"
                    )
                return _open_parquet(files, data) if suffix == ".parquet" else open_tars(files)
        return open_folder(path)
    if files := find_files(path, ".parquet", split):
        return _open_parquet(files, data)
    if tars := find_tars(data):
        return open_tars(tars)
    if path.exists():
        raise ValueError(f"{data}: not a folder, a .parquet file, a .tar or a Hub data set id")
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise ValueError(f"{data}: no such file or folder (a Hub data set id has the form owner/name)")
    from datasets import load_dataset

    try:
        table = load_dataset(data, split=split)
    except Exception as error:
        raise hub_error(data, error) from error
    return open_table(table, data)


def hub_error(data: str, error: Exception) -> ValueError:
    """Why a data set cannot be had from the Hub, and what to do."""
    return ValueError(f"{data}: no such folder, and from the Hub: {hub_reason(error, 'dataset')}")


def find_files(path: Path, suffix: str, split: str) -> list[Path]:
    """The files of a kind and a split in a folder, or the one that ``path`` is; none where there are none."""
    if path.is_file():
        return [path] if path.suffix == suffix else []
    found = (f for f in path.rglob(f"*{suffix}") if f.is_file() and not f.name.startswith("."))  # ._a: macOS's own
    files = sorted(found, key=lambda file: natural_key(str(file)))
    return of_split(files, path, split) if files else []


def _open_parquet(files: list[Path], data: str) -> Opened:
    from datasets import Dataset

    try:
        table = Dataset.from_parquet([str(file) for file in files])
    except Exception as error:  # datasets wraps arrow's errors in types of its own
        raise ValueError(f"{data}: cannot be read as parquet ({type(error).__name__}: {error})") from error
    return open_table(table, data, tuple(files))
