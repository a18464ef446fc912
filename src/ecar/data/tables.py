"""Tables of images: parquet files, whoever wrote them, read in place; and data sets of the Hub."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ecar.data.columns import BYTES, PICTURES, TEXT, Columns, cell_bytes, cell_path, choose_columns
from ecar.data.labels import as_label
from ecar.data.reading import ReadOptions
from ecar.data.rows import Opened, file_state, printable

_BATCH = 32  # rows read at a time
_PEEK = 8


class ParquetRows:
    """Images in a column of parquet files: reading on from a row is quick, going back begins with its row group."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int], column: str, root: Path) -> None:
        self.files, self.column, self.root = tuple(files), column, root
        self._starts = [0, *accumulate(counts)]
        self._batches: Iterator[list[Any]] = iter(())
        self._first, self._cells = 0, list[Any]()  # rows that are at hand
        self._end = -1  # of the file that ``_batches`` goes through
        self._paths: list[str | None] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> bytes:
        """Raises ValueError, not BadImageError, for a file that is gone or damaged."""
        while not self._first <= index < self._first + len(self._cells):
            self._advance(index)
        file = self.files[bisect_right(self._starts, index) - 1]
        return cell_bytes(self._cells[index - self._first], (file.parent, self.root))

    def path(self, index: int) -> str:
        if self._paths is None:
            self._paths = [path for file in self.files for path in _read_paths(file, self.column)]
        return printable(self._paths[index] or f"row {index}")

    def state(self) -> list[str]:
        return [f"{f.name} {file_state(f)}" for f in self.files]

    def _advance(self, index: int) -> None:
        after = self._first + len(self._cells)
        if not after <= index < self._end:
            number = bisect_right(self._starts, index) - 1
            file, after = self.files[number], self._starts[number]
            with _in_words(file):
                opened = _open_file(file)
                group, count = 0, opened.metadata.row_group(0).num_rows
                while index >= after + count:
                    group, after = group + 1, after + count
                    count = opened.metadata.row_group(group).num_rows
            self._batches, self._end = _cells(file, opened, group, self.column), self._starts[number + 1]
        self._first, self._cells = after, next(self._batches)


@contextmanager
def _in_words(file: Path) -> Iterator[None]:
    """Errors of arrow as a ValueError with the file's name: a damaged file is no single bad image."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read as parquet ({' '.join(str(error).split())})") from error


def _open_file(file: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file)


def _cells(file: Path, opened: Any, group: int, column: str) -> Iterator[list[Any]]:
    groups = list(range(group, opened.num_row_groups))
    with _in_words(file):
        for batch in opened.iter_batches(_BATCH, row_groups=groups, columns=[column]):
            yield batch.column(0).to_pylist()


def _read_paths(file: Path, column: str) -> list[str | None]:
    """Without the bytes beside them."""
    import pyarrow as pa

    with _in_words(file):
        opened = _open_file(file)
        kind = opened.schema_arrow.field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            cells = opened.read(columns=[f"{column}.path"]).column(0).to_pylist()
            return [cell_path(cell) for cell in cells]
        if kind_of(kind) == TEXT:
            return [cell_path(cell) for cell in opened.read(columns=[column]).column(0).to_pylist()]
        return [None] * int(opened.metadata.num_rows)


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """A parquet file: rows, and its columns; ``columns`` is None where none holds images."""

    file: Path
    count: int
    kinds: dict[str, str]
    columns: Columns | None

    @property
    def is_of_paths(self) -> bool:
        """Whether its images lie in files of their own."""
        return self.columns is not None and self.kinds[self.columns.image] == TEXT


def look_into(file: Path, root: Path, read: ReadOptions, *, may_lack: bool = False) -> TableFile:
    """The columns of a parquet file under ``root``; with ``may_lack`` it need not have those that were asked for.

    Raises:
        ValueError: it is damaged, or its columns leave doubt.
    """
    with _in_words(file):
        opened = _open_file(file)
        count, (kinds, classes) = int(opened.metadata.num_rows), _described(opened.schema_arrow)

        def peek(column: str) -> list[Any]:
            for batch in opened.iter_batches(_PEEK, columns=[column]):
                values = [value for value in batch.column(0).to_pylist() if value is not None]
                if values:
                    return values
            return []

        if may_lack:
            image, label = (c if c in kinds else None for c in (read.image_column, read.label_column))
            read = replace(read, image_column=image, label_column=label)
        columns = choose_columns(kinds, classes, peek, read, str(file), (file.parent, root))
        return TableFile(file=file, count=count, kinds=kinds, columns=columns)


def no_images(table: TableFile) -> ValueError:
    """Why a table cannot be read."""
    kinds = ", ".join(f"{column} ({kind})" for column, kind in table.kinds.items())
    return ValueError(f"{table.file}: no column of images among {kinds}")


def _described(schema: Any) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """The kind of each column, and the class names of those that have them."""
    kinds = {field.name: kind_of(field.type) for field in schema}
    features = _features(schema.metadata or {})
    other = {c: f["_type"] for c, f in features.items() if isinstance(f, dict) and "_type" in f}
    kinds |= {c: kind.lower() for c, kind in other.items() if kinds.get(c) == PICTURES and kind != "Image"}  # Audio
    return kinds, {c: names for c, f in features.items() if c in kinds and (names := _class_names(f))}


def kind_of(kind: Any) -> str:
    """An arrow type as the kind of a column."""
    import pyarrow as pa

    types = pa.types
    if types.is_struct(kind):
        names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        binary = "bytes" in names and kind_of(names["bytes"]) == BYTES
        return PICTURES if binary or names.keys() <= {"bytes", "path"} else "a struct"
    if types.is_dictionary(kind):
        return kind_of(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return BYTES
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXT
    return str(kind)


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """What ``datasets`` wrote of the columns."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return features if isinstance(features, dict) else {}
    except (KeyError, ValueError, TypeError):
        return {}


def _class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def open_parquet(tables: list[TableFile], root: Path) -> Opened:
    """Parquet files whose columns were found, as rows in their order.

    Raises:
        ValueError: files that differ in these columns.
    """
    first = tables[0]
    assert first.columns is not None
    columns = first.columns
    for table in tables[1:]:
        _check_same(first, table)
    rows = ParquetRows([t.file for t in tables], [t.count for t in tables], columns.image, root)
    labels = None
    if columns.label is not None:
        labels = [label for table in tables for label in _read_labels(table.file, columns.label)]
    return Opened(rows=rows, labels=labels, class_names=columns.class_names, note=columns.note)


def _read_labels(file: Path, column: str) -> list[Any]:
    with _in_words(file):
        return [as_label(value) for value in _open_file(file).read(columns=[column]).column(0).to_pylist()]


def _check_same(first: TableFile, other: TableFile) -> None:
    assert first.columns is not None
    for column in (first.columns.image, first.columns.label):
        if column is not None and column not in other.kinds:
            raise ValueError(f"{other.file}: has no column {column!r}, which {first.file.name} has; give one kind")
    if other.columns is None or other.columns.image != first.columns.image:
        raise ValueError(f"{other.file}: {first.columns.image!r} holds no images there, but in {first.file.name}")
    if other.columns.label != first.columns.label:
        raise ValueError(
            f"{other.file}: labels are in the column {other.columns.label!r}, but of {first.file.name} in "
            f"{first.columns.label!r}; name one with --label-column"
        )
    if other.columns.class_names != first.columns.class_names:
        raise ValueError(f"{other.file}: names other classes than {first.file.name}; give one of them")
    label = first.columns.label
    if label is not None and (first.kinds[label] == TEXT) != (other.kinds[label] == TEXT):
        raise ValueError(
            f"{other.file}: {label!r} is {other.kinds[label]}, but {first.kinds[label]} in {first.file.name}"
        )


def paths_of(tables: list[TableFile], root: Path) -> set[Path]:
    """The image files that tables of paths name."""
    found: set[Path] = set()
    for table in tables:
        assert table.columns is not None
        for path in _read_paths(table.file, table.columns.image):
            found |= {folder / path for folder in (table.file.parent, root)} if path else set()
    return found


@dataclass(frozen=True)
class HubRows:
    """A ``datasets.Dataset`` whose image column is not decoded."""

    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        return cell_bytes(self.table[index][self.column])

    def path(self, index: int) -> str:
        return printable(cell_path(self.table[index][self.column]) or f"row {index}")

    def state(self) -> list[str]:
        return [str(self.table._fingerprint)]


def open_hub(table: Any, data: str, read: ReadOptions) -> Opened:
    """A ``datasets.Dataset`` as rows, its image column left encoded.

    Raises:
        ValueError: no column of images, or doubt.
    """
    from datasets import Image

    for column, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(column, Image(decode=False))
    kinds, classes = _described(table.features.arrow_schema)

    def peek(column: str) -> list[Any]:
        examples = [row[column] for row, _ in zip(iter(table), range(_PEEK), strict=False)]
        return [value for value in examples if value is not None]

    columns = choose_columns(kinds, classes, peek, read, data)
    if columns is None:
        raise ValueError(f"{data}: no column of images among {', '.join(kinds)}")
    if columns.label is None and "json" in kinds and kinds["json"] not in (BYTES, TEXT):  # of WebDataset samples
        columns = replace(columns, label="json", note=f"images: column {columns.image}; labels: label in json")
    labels = None if columns.label is None else [_label_of(value) for value in table[columns.label]]
    if columns.label == "json" and labels is not None and all(label is None for label in labels):
        labels = None  # captions
    return Opened(rows=HubRows(table, columns.image), labels=labels, class_names=columns.class_names, note=columns.note)


def _label_of(value: Any) -> Any:
    """A label from its cell: of the .json of a WebDataset sample its "label"."""
    return as_label(value.get("label") if isinstance(value, dict) else value)
