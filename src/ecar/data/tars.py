"""Tars of images (key.jpg + key.cls or key.json) with random access: an index of byte offsets, nothing extracted."""

from __future__ import annotations

import glob
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ecar.data.reading import ReadOptions, add_left_out, shortened
from ecar.data.rows import Opened, file_state, natural_key, printable
from ecar.data.samples import Member, Samples, scan_tar
from ecar.files.access import check_readable
from ecar.files.records import write_atomically

_VERSION = 3


@dataclass(frozen=True)
class TarRows:
    """Images inside tars: ``members[i]`` lies in ``tars[i]``."""

    tars: tuple[Path, ...]
    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> bytes:
        """Raises ValueError, not BadImageError: a shard that is gone or cut is no single bad image."""
        tar, member = self.tars[index], self.members[index]
        try:
            with open(tar, "rb") as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise ValueError(f"{tar}: cannot be read at offset {member.offset} ({error.strerror})") from None
        if len(data) != member.size:
            raise ValueError(f"{tar}: ends at offset {member.offset + len(data)}, inside {member.key!r}; copy it again")
        return data

    def path(self, index: int) -> str:
        return printable(f"{self.tars[index]}: {self.members[index].key}")

    def state(self) -> list[str]:
        return [f"{tar.name} {file_state(tar)}" for tar in dict.fromkeys(self.tars)]


def find_tars(data: str) -> list[Path]:
    """Tars of a pattern such as ``train-{000..127}.tar`` or ``train-*.tar``, or of a single name; else none.

    Raises:
        ValueError: a file that the braces name is missing, or nothing matches the stars.
    """
    names = expand_braces(os.path.expanduser(data))
    if not all(name.endswith(".tar") for name in names):
        return []
    files: list[Path] = []
    for name in names:
        check_readable(Path(name))
        found = [name] if os.path.isfile(name) else glob.glob(name)
        if not found:
            raise ValueError(f"{data}: no such tar: {name}")
        files += [Path(f) for f in found]
    return sorted(set(files), key=lambda file: natural_key(str(file)))


def expand_braces(pattern: str) -> list[str]:
    """``a{08..10}`` -> a08, a09, a10; ``a{x,y}`` -> ax, ay; any number of braces."""
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if brace is None:
        return [pattern]
    first, last, words = brace.groups()
    parts = words.split(",") if words else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for part in parts for name in expand_braces(pattern[: brace.start()] + part + pattern[brace.end() :])]


def open_tars(files: list[Path], read: ReadOptions) -> Opened:
    """Tars as rows, in the order of ``files``. Classes: ``classes.txt`` beside the first tar (one name a line), else
    the values that occur.

    Raises:
        ValueError: a damaged tar, names that lead outside, a sample with two images, labels for some samples only.
    """
    tars: list[Path] = []
    members: list[Member] = []
    left_out: dict[str, list[str]] = {}
    for file in files:
        found = read_index(file, read)
        tars += [file] * len(found.members)
        members += found.members
        for reason, names in found.left_out.items():
            add_left_out(left_out, {reason: [f"{file.name}: {name}" for name in names]})
    if not members:
        rest = "; ".join(f"{reason}: {shortened(names, 3)}" for reason, names in left_out.items())
        asked = f" of the suffix {read.image_column!r} (--image-column)" if read.image_column else ""
        raise ValueError(f"{files[0]}: no images{asked} found in {len(files)} tar files{'; ' if rest else ''}{rest}")
    rows = TarRows(tuple(tars), tuple(members))
    source = read.label_column or '.cls, or "label" in .json'
    bare = next((i for i, m in enumerate(members) if m.label is None), None)
    if bare is None:
        listed = files[0].parent / "classes.txt"
        lines = listed.read_text(encoding="utf-8-sig").split("\n") if listed.exists() else []
        return Opened(
            rows=rows,
            labels=[m.label for m in members],
            class_names=tuple(name.strip() for name in lines if name.strip()),
            note=f"labels: {source}" + (", named by classes.txt" if lines else ""),
            left_out=left_out,
        )
    if read.label_column is not None or any(m.label is not None for m in members):
        raise ValueError(f"{rows.path(bare)} has no label ({source}), but other samples have one")
    return Opened(rows=rows, labels=None, note=f"no labels ({source}) beside the images", left_out=left_out)


def read_index(tar: Path, read: ReadOptions) -> Samples:
    """The samples of a tar, from the index beside it, which is made where it is missing or stale (another size or
    time of the tar). With columns that were asked for, the tar itself is read."""
    if read.image_column is not None or read.label_column is not None:
        return scan_tar(tar, read.image_column, read.label_column)
    status, path = tar.stat(), tar.with_name(tar.name + ".index.json")
    state = [_VERSION, status.st_size, status.st_mtime_ns]
    try:
        record = json.loads(path.read_text())
        if record["state"] == state:
            return Samples([Member(*row) for row in record["samples"]], record["left_out"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = scan_tar(tar)
    rows = [[m.key, m.offset, m.size, m.label] for m in found.members]
    with suppress(OSError):  # a read-only folder: the tar is scanned every time
        record = {"state": state, "samples": rows, "left_out": found.left_out}
        write_atomically(path, json.dumps(record).encode())
    return found
