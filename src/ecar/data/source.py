"""Where images come from: a folder, tars, parquet files or a Hub data set, all with random access."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecar.data.ahead import in_order
from ecar.data.folders import Found, is_of_split, of_split, open_folder, walk
from ecar.data.labels import class_ids
from ecar.data.reading import ReadOptions, add_left_out, shortened
from ecar.data.rows import Opened, Rows, choose_rows, natural_key, printable
from ecar.data.tables import TableFile, look_into, no_images, open_hub, open_parquet, paths_of
from ecar.data.tars import find_tars, open_tars
from ecar.files.access import check_readable
from ecar.files.images import BadImageError, decode_image, fit
from ecar.files.remote import hub_reason

__all__ = ["BadImages", "ImageReport", "ImageSource", "ReadOptions", "iterate_images", "load_source", "natural_key"]

_FEW = 5
_SHOWN, _EXAMPLES = 12, 4  # classes and names in lines for people
_SAID = ContextVar("said", default=False)


@contextmanager
def said_before() -> Iterator[None]:
    """No lines about what data sets hold: whoever opens them inside has said it."""
    token = _SAID.set(True)
    try:
        yield
    finally:
        _SAID.reset(token)


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
        note: where images and labels were found, in words.
        left_out: names of what is there and not read, by reason.
    """

    name: str
    rows: Rows
    chosen: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    empty_classes: tuple[str, ...] = ()
    note: str = ""
    left_out: dict[str, list[str]] = field(default_factory=dict)

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

    def state(self) -> str:
        """A fingerprint of the data."""
        digest = hashlib.sha256(self.labels.tobytes() + self.chosen.tobytes())
        for part in (*self.rows.state(), *self.class_names):
            digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:16]

    def path(self, index: int) -> str:
        """Path of one image's file, or its row number, for messages."""
        return self.rows.path(int(self.chosen[index]))

    def classes(self) -> dict[str, int]:
        """Images per class name."""
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        found: dict[str, int] = {}
        for name, count in zip(self.class_names, counts, strict=False):  # ImageNet has two classes "crane"
            found[name] = found.get(name, 0) + count
        return found

    def about(self) -> dict[str, Any]:
        """For records: numbers of images and of what is left out, classes, and where they were found."""
        return {
            "images": len(self),
            "of": len(self.rows),
            "found": self.note,
            "classes": self.classes(),
            "left_out": {reason: len(names) for reason, names in self.left_out.items()},
        }

    def in_words(self) -> list[str]:
        """Lines for people: images, classes, and what is left out."""
        of = f" of {len(self.rows):,}" if len(self.rows) > len(self) else ""
        classes = [f"{name}: {count:,}" for name, count in self.classes().items()]
        named = f"classes: {len(self.class_names):,} ({shortened(classes, _SHOWN)})" if classes else "classes: none"
        lines = [f"{printable(self.name)}: images: {len(self):,}{of} ({self.note}); {named}"]
        for reason, names in self.left_out.items():
            lines.append(f"  left out, {reason}: {len(names):,} ({shortened(names, _EXAMPLES)})")
        return lines


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


def load_source(data: str, read: ReadOptions | None = None, *, max_images: int | None = None) -> ImageSource:
    """Open ``data``: a folder of images (side files or class subfolders give labels), tars (folder, file, or pattern
    with braces or stars), a parquet file or folder, or a Hub id. Says on stderr what was found, and what is left out.

    Args:
        data: as ``--data`` takes it.
        read: split and columns.
        max_images: use only so many, a seeded choice.

    Raises:
        ValueError: nothing there, no images, doubt about what are images or labels, or labels out of range.
    """
    opened = _open_data(data, read or ReadOptions())
    total = len(opened.rows)
    if total == 0:
        raise ValueError(f"{data}: no images found")
    names, labels = opened.class_names, np.zeros(total, np.int64)
    if opened.labels is not None:
        labels, names = class_ids(opened.labels, names, data)
    chosen = choose_rows(total, max_images)
    source = ImageSource(
        name=data,
        rows=opened.rows,
        chosen=chosen,
        labels=labels[chosen],
        class_names=names,
        empty_classes=opened.empty_classes,
        note=opened.note,
        left_out=opened.left_out,
    )
    if os.environ.get("RANK", "0") == "0" and not _SAID.get():
        print("\n".join(source.in_words()), file=sys.stderr)
    return source


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


def _open_data(data: str, read: ReadOptions) -> Opened:
    """What ``data`` names, whatever kind it is."""
    path = Path(data).expanduser()
    check_readable(path)
    if path.is_dir():
        return _open_directory(path, data, read)
    if path.is_file() and path.suffix.lower() == ".parquet":
        table = look_into(path, path.parent, read)
        if table.columns is None:
            raise no_images(table)
        return open_parquet([table], path.parent)
    if tars := find_tars(data):
        return open_tars(tars, read)
    if path.exists():
        raise ValueError(f"{data}: not a folder, a .parquet file, a .tar or a Hub data set id")
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise ValueError(f"{data}: no such file or folder (a Hub data set id has the form owner/name)")
    from datasets import load_dataset

    try:
        table = load_dataset(data, split=read.split)
    except Exception as error:
        reason = hub_reason(error, "dataset")
        raise ValueError(f"{data}: no such folder, and from the Hub: {reason}") from error
    return open_hub(table, data, read)


def _open_directory(path: Path, data: str, read: ReadOptions) -> Opened:
    """Tables, tars or loose images: one kind of a folder, and why the rest is left out."""
    found = walk(path)
    tables = _tables(found, read)
    tars = _of_split(found, found.tars, read.split)
    images = found.images
    if tables and all(table.is_of_paths for table in tables):
        named = paths_of(tables, path)
        found.leave("images that the table does not name", *(image for image in images if image not in named))
        images = []
    kinds = [[table.file for table in tables], tars, images]
    if sum(map(bool, kinds)) > 1:
        first = [f"{found.name(files[0])} ({len(files):,})" for files in kinds if files]
        raise ValueError(
            f"{data}: holds archives and images of several kinds, such as {', '.join(first)}; give one, or move the "
            "others"
        )
    if tables or tars:
        opened = open_parquet(tables, path) if tables else open_tars(tars, read)
        found.leave("side files", *found.sides)
        add_left_out(found.left_out, opened.left_out)
        opened = replace(opened, left_out=found.left_out)
    else:
        opened = open_folder(found, read)
    if read.split == ReadOptions.split or any(is_of_split(file, path, read.split) for files in kinds for file in files):
        return opened
    return replace(opened, note=f"{opened.note}; no name tells its split, so all is read")


def _tables(found: Found, read: ReadOptions) -> list[TableFile]:
    """The tables of the split that have images; the others, such as the metadata beside tars, are left out."""
    files, others = _of_split(found, found.tables, read.split), bool(found.tars or found.images)
    looked = [look_into(file, found.root, read, may_lack=others) for file in files]
    tables = [table for table in looked if table.columns is not None]
    if looked and not tables and not others:
        raise no_images(looked[0])
    found.leave("tables without a column of images", *(table.file for table in looked if table.columns is None))
    found.leave("tables without rows", *(table.file for table in tables if not table.count))
    tables = [table for table in tables if table.count]
    return [look_into(table.file, found.root, read) for table in tables] if others else tables


def _of_split(found: Found, files: list[Path], split: str) -> list[Path]:
    if not files:
        return []
    chosen, rest = of_split(files, found.root, split)
    found.leave(f"not of the split {split}", *rest)
    return chosen
