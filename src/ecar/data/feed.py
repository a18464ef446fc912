"""Encoded images one after another, from any row on: what ``ecar encode`` reads, with or without random access."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ecar.data.rows import IMAGE_SUFFIXES, LABEL_COLUMNS, cell_bytes, file_state, printable
from ecar.data.source import ImageSource, find_files, hub_error, load_source
from ecar.data.tars import as_id, check_end, find_tars
from ecar.files.images import BadImageError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image of a feed.

    Attributes:
        row: its place in the feed.
        id: its stable name.
        label: as the data have it; None without labels.
        data: its encoded bytes, or why they cannot be read.
    """

    row: int
    id: str
    label: int | str | None
    data: bytes | BadImageError


class Feed(Protocol):
    """A sequence of samples whose order never changes."""

    @property
    def name(self) -> str:
        """What the user asked for, for messages."""

    def __len__(self) -> int:
        """Number of rows; 0 where that shows only at the end."""

    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, whose ids the labels are; None: the labels are whatever the data have."""

    def state(self) -> str:
        """A fingerprint of the data."""

    def samples(self, start: int) -> Iterator[Sample]:
        """The samples from row ``start`` on."""

    def where(self, sample: Sample) -> str:
        """Where a sample lies, for messages."""


@dataclass(frozen=True)
class SourceFeed:
    """The rows of an image source."""

    source: ImageSource

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def classes(self) -> tuple[str, ...]:
        return self.source.class_names

    def state(self) -> str:
        source = self.source
        parts = [*source.rows.state(), *source.class_names]
        return _digest(parts, source.labels.tobytes() + source.chosen.tobytes())

    def samples(self, start: int) -> Iterator[Sample]:
        for row, data in self.source.encoded(start):
            label = int(self.source.labels[row]) if self.source.class_names else None
            yield Sample(row=row, id=self.source.id(row), label=label, data=data)

    def where(self, sample: Sample) -> str:
        return self.source.path(sample.row)


@dataclass(frozen=True)
class StreamFeed:
    """A ``datasets.IterableDataset``, never shuffled: its order, and so the place to go on from, is exact.

    Attributes:
        name: what the user asked for.
        table: the data set, images not decoded.
        columns: its image columns: of an example the first that holds something.
        version: fingerprint of the files, or the revision on the Hub.
        limit: number of rows to use; None: all.
    """

    name: str
    table: Any
    columns: tuple[str, ...]
    version: str
    limit: int | None

    def __len__(self) -> int:
        return 0

    def classes(self) -> tuple[str, ...] | None:
        feature = next((self.table.features[c] for c in LABEL_COLUMNS if c in self.table.features), None)
        names = getattr(feature, "names", None)
        return None if names is None else tuple(names)

    def state(self) -> str:
        return self.version if self.limit is None else f"{self.version}, first {self.limit}"

    def samples(self, start: int) -> Iterator[Sample]:
        table = self.table if self.limit is None else self.table.take(self.limit)
        for row, example in enumerate(table.skip(start), start):
            cell = next((example[c] for c in self.columns if example.get(c) is not None), None)
            yield Sample(row=row, id=_example_id(example, row), label=_example_label(example), data=_bytes(cell))

    def where(self, sample: Sample) -> str:
        return f"{self.name}: {sample.id}"


def open_source(data: str, *, split: str = "train", max_images: int | None = None) -> SourceFeed:
    """As ``load_source``."""
    return SourceFeed(load_source(data, split=split, max_images=max_images))


def open_stream(data: str, *, split: str = "train", max_images: int | None = None) -> StreamFeed:
    """Parquet files, WebDataset tars or a Hub data set as a stream.

    Raises:
        ValueError: none of these, or no image column.
    """
    from datasets import Features, Image, Value

    path = Path(data).expanduser()
    parquet = find_files(path, ".parquet", split)
    tars = [] if parquet else find_files(path, ".tar", split) or find_tars(data)
    for tar in tars:
        check_end(tar)  # what reads a stream takes a cut tar for a whole one
    kind, files = "webdataset" if tars else "parquet", tars or parquet
    if files:
        table = _stream(data, kind, data_files=[str(f) for f in files], split="train")
        version = _digest([f"{f.name} {file_state(f)}" for f in files])
    elif path.exists():
        raise ValueError(f"{data}: only parquet, WebDataset tars and Hub ids are streamed; leave out --streaming")
    elif data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise ValueError(f"{data}: no such file or folder (a Hub data set id has the form owner/name)")
    else:
        version = _hub_revision(data)
        table = _stream(data, data, split=split, revision=version)
    if table.features is None:  # not declared: from the first examples
        table = table._resolve_features()
    if tars:  # declared by the first examples too: later ones of another format were empty, later labels dropped
        formats = {suffix[1:]: Image() for suffix in IMAGE_SUFFIXES}
        features = Features({**formats, "cls": Value("int64"), **table.features})
        table = _stream(data, kind, data_files=[str(f) for f in files], split="train", features=features)
    images = [c for c, f in (table.features or {}).items() if isinstance(f, Image)]
    images = images if tars else images[:1]  # a second column may be masks, or depth
    if not images:
        raise ValueError(f"{data}: no image column among {list(table.features or {})}")
    for column in images:
        table = table.cast_column(column, Image(decode=False))
    return StreamFeed(data, table, tuple(images), version, max_images)


def _stream(data: str, *arguments: Any, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(*arguments, streaming=True, **options)
    except Exception as error:  # datasets wraps the errors of arrow and of the network in types of its own
        named = "invalid literal for int()" in str(error)  # datasets takes what a .cls holds for a number
        hint = (
            "; a .cls with a class name is not streamed: put it in a .json, or leave out --streaming" if named else ""
        )
        raise ValueError(f"{data}: cannot be streamed ({type(error).__name__}: {error}){hint}") from error


def _hub_revision(data: str) -> str:
    """The commit that the data set is at now: what is encoded must not change on the way."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(data).sha)
    except Exception as error:
        raise hub_error(data, error) from error


def _bytes(cell: dict[str, Any] | None) -> bytes | BadImageError:
    try:
        return cell_bytes(cell)
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(str(error))


def _example_id(example: dict[str, Any], row: int) -> str:
    if "__key__" not in example:
        return f"row-{row}"
    return printable(f"{Path(str(example.get('__url__', ''))).name}/{example['__key__']}")


def _example_label(example: dict[str, Any]) -> int | str | None:
    label = next((example[c] for c in (*LABEL_COLUMNS, "cls") if c in example), None)
    if label is None and isinstance(example.get("json"), dict):
        label = example["json"].get("label")
    if isinstance(label, bytes):
        label = label.decode("utf-8").strip()
    return as_id(label)


def _digest(parts: list[str], data: bytes = b"") -> str:
    digest = hashlib.sha256(data)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]
