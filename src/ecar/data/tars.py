"""WebDataset tars (key.jpg + key.cls or key.json) with random access: an index of byte offsets, nothing extracted."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ecar.data.rows import IMAGE_SUFFIXES, Opened, file_state, natural_key, printable
from ecar.files.records import write_atomically

_IMAGES = {suffix[1:] for suffix in IMAGE_SUFFIXES}
_LABELS = {"cls", "json"}
_MAX_LABEL_BYTES = 1 << 20
_VERSION = 2
_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One sample of a tar: its key, where its image lies (bytes), and its label as the tar has it."""

    key: str
    offset: int
    size: int
    label: int | str | None


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

    def id(self, index: int) -> str:
        return printable(f"{self.tars[index].name}/{self.members[index].key}")

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


def open_tars(files: list[Path]) -> Opened:
    """Tars as rows, in the order of ``files``. Classes: ``classes.txt`` beside the first tar (one name a line), else
    the values that occur.

    Raises:
        ValueError: a damaged tar, names that lead outside, a sample with two images, labels for some samples only.
    """
    tars: list[Path] = []
    members: list[Member] = []
    for file in files:
        found = read_index(file)
        tars += [file] * len(found)
        members += found
    if not members:
        raise ValueError(
            f"{files[0]}: no images found in {len(files)} tar files (looked for {', '.join(sorted(_IMAGES))})"
        )
    rows = TarRows(tuple(tars), tuple(members))
    bare = next((i for i, m in enumerate(members) if m.label is None), None)
    if bare is None:
        listed = files[0].parent / "classes.txt"
        names = tuple(listed.read_text(encoding="utf-8").split("\n")) if listed.exists() else ()
        names = tuple(name.strip() for name in names if name.strip())
        return Opened(rows=rows, labels=[m.label for m in members if m.label is not None], class_names=names)
    if any(m.label is not None for m in members):
        raise ValueError(f'{rows.path(bare)} has no label (.cls, or .json with "label"), but other samples have one')
    return Opened(rows=rows, labels=None)


def read_index(tar: Path) -> list[Member]:
    """The samples of a tar, from the index beside it, which is made where it is missing or stale (another size or
    time of the tar)."""
    status, path = tar.stat(), tar.with_name(tar.name + ".index.json")
    state = [_VERSION, status.st_size, status.st_mtime_ns]
    try:
        record = json.loads(path.read_text())
        if record["state"] == state:
            return [Member(*row) for row in record["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    members = scan_tar(tar)
    rows = [[m.key, m.offset, m.size, m.label] for m in members]
    with suppress(OSError):  # a read-only folder: the tar is scanned every time
        write_atomically(path, json.dumps({"state": state, "samples": rows}).encode())
    return members


def scan_tar(tar: Path) -> list[Member]:
    """The samples of a tar, from its headers.

    Raises:
        ValueError: not a plain tar, cut off (with the offset), a name that leads outside, two images of one key.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | str] = {}
    offset = 0
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                offset = info.offset
                name = PurePosixPath(info.name)
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError(f"{tar}: member {info.name!r} at offset {offset} leads outside the tar; refused")
                stem, _, suffix = name.name.partition(".")
                key, suffix = str(name.with_name(stem)) if stem else "", suffix.lower()
                if not info.isreg() or not key:
                    continue
                if suffix in _IMAGES:
                    if key in images:
                        raise ValueError(f"{tar}: a second image of {key!r} at offset {offset}")
                    images[key] = (info.offset_data, info.size)
                elif suffix in _LABELS and info.size <= _MAX_LABEL_BYTES:
                    text = archive.extractfile(info)
                    assert text is not None  # a regular file
                    label = _label(text.read(), suffix, f"{tar}: {info.name} at offset {offset}")
                    if label is not None:
                        labels[key] = label
            # tarfile takes a cut or a damaged header for the end; the true end is a block of zeros.
            offset = archive.offset
            file.seek(offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{tar}: damaged or cut off at offset {offset} ({error}); copy it again") from None
    return [Member(key, *place, labels.get(key)) for key, place in images.items()]


def _label(data: bytes, suffix: str, where: str) -> int | str | None:
    try:
        text = data.decode("utf-8").strip()
        value = json.loads(text) if suffix == "json" else text
    except ValueError as error:
        raise ValueError(f"{where}: not readable as a label ({error})") from None
    if suffix == "json":
        value = value.get("label") if isinstance(value, dict) else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise ValueError(f"{where}: the label is {value!r}, not a class id or name")
    return as_id(value)


def as_id(label: int | str | None) -> int | str | None:
    """A label that is a number written out as that number: "7", but not "07", which may be a name beside "7"."""
    return int(label) if isinstance(label, str) and label.isdecimal() and str(int(label)) == label else label


def check_end(tar: Path) -> None:
    """ValueError unless the file ends as a tar does, with a block of zeros. Cheap."""
    size = tar.stat().st_size
    with open(tar, "rb") as file:
        file.seek(max(0, size - _BLOCK))
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(f"{tar}: damaged or cut off at offset {size} (no end mark); copy it again")
