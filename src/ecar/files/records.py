"""Files that are there whole or not at all, and JSON that says where it is damaged."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, rename: a kill or a power cut leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)  # the rename itself


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file of JSON; ValueError with the file's name and the ``remedy`` where there is none."""
    try:
        record = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: holds no record; {remedy}")
    return record


def output_file(out: str, suffixes: Sequence[str], flag: str = "--out") -> Path:
    """An output path, checked before work starts.

    Raises:
        ValueError: unknown suffix, missing or unwritable folder.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {out}: the name must end in {' or '.join(suffixes)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink(missing_ok=True)  # other processes of the same command do this too
    except OSError as error:
        raise ValueError(f"{flag} {out}: cannot write there ({error.strerror})") from None
    return path


def make_out(out: str, data: str, *, pictures: bool = True) -> Path:
    """The output folder, made and proven writable; ValueError otherwise, and where ``pictures`` would be written into
    the folder of the data: they would be images of the next run."""
    if not out or not data:
        raise ValueError("--out and --data take a name, and one of them is empty")
    folder = Path(out).expanduser()
    if pictures and folder.resolve().is_relative_to(Path(data).expanduser().resolve()):
        raise ValueError(f"--out {out} lies inside --data {data}: choose a folder beside it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error.strerror})") from None
    return folder
