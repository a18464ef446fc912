"""Encoded images one after another, from any row on: what ``ecar encode`` reads, with or without random access."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar.data.columns import Columns, cell_bytes
from ecar.data.reading import ReadOptions
from ecar.data.rows import FolderRows, Sample, printable
from ecar.data.source import ImageSource, as_source, check_hub_id, hub_error, load_source, open_data
from ecar.data.tables import hub_columns, label_of
from ecar.files.images import BadImageError


@dataclass(frozen=True)
class StreamFeed:
    """Samples of a ``datasets.IterableDataset``, never shuffled: its order, and so the place to go on from, is exact.

    Attributes:
        name: what the user asked for.
        table: the data set, images not decoded.
        columns: those of images and labels.
        version: the revision on the Hub.
        limit: number of rows to use; None: all.
    """

    name: str
    table: Any
    columns: Columns
    version: str
    limit: int | None

    def __len__(self) -> int:
        return 0

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """None: the labels are whatever the data have."""
        return self.columns.class_names or (None if self.columns.label else ())

    def about(self) -> dict[str, Any]:
        return {"found": self.columns.note}

    def state(self) -> str:
        return self.version if self.limit is None else f"{self.version}, first {self.limit}"

    def samples(self, start: int) -> Iterator[Sample]:
        table = self.table if self.limit is None else self.table.take(self.limit)
        for row, example in enumerate(table.skip(start), start):
            label = label_of(example.get(self.columns.label)) if self.columns.label else None
            yield Sample(row=row, id=_example_id(example, row), label=label, data=_bytes(example[self.columns.image]))

    def where(self, sample: Sample) -> str:
        return f"{self.name}: {sample.id}"


Feed = ImageSource | StreamFeed
open_source = load_source


def open_stream(data: str, read: ReadOptions | None = None, *, max_images: int | None = None) -> Feed:
    """Parquet files or tars in their order, the first ``max_images``; or a Hub data set without a local copy.

    Raises:
        ValueError: none of these, or no image column.
    """
    read, path = read or ReadOptions(), Path(data).expanduser()
    if path.exists() or data.endswith(".tar"):
        opened = open_data(data, read)
        if isinstance(opened.rows, FolderRows):
            raise ValueError(f"{data}: only parquet, tars and Hub ids are streamed; leave out --streaming")
        return as_source(opened, data, max_images=max_images, first=True)
    check_hub_id(data)
    version = _hub_revision(data)
    table, columns = hub_columns(_stream(data, read.split, version), data, read)
    print(f"{data}: a stream ({columns.note})", file=sys.stderr)
    return StreamFeed(data, table, columns, version, max_images)


def _stream(data: str, split: str, revision: str) -> Any:
    from datasets import load_dataset

    try:
        table = load_dataset(data, split=split, revision=revision, streaming=True)
        return table if table.features is not None else table._resolve_features()  # from the first examples
    except Exception as error:
        raise hub_error(data, error) from error


def _hub_revision(data: str) -> str:
    """The commit that the data set is at now: what is encoded must not change on the way."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(data).sha)
    except Exception as error:
        raise hub_error(data, error) from error


def _bytes(cell: Any) -> bytes | BadImageError:
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
