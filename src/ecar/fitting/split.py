"""The pictures that are used, in two folders: what is trained on and what is held out. Broken pictures and second
copies are in neither: a copy on the other side would pass for memorisation."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ecar.data.check import BROKEN, DataReport, check_images
from ecar.data.rows import FolderRows, choose_rows
from ecar.data.source import ImageSource, load_source
from ecar.files.records import read_json, write_atomically
from ecar.fitting.options import Photographs

LEAST = 20  # pictures
FEW = 500  # below, a model is likely to overfit
_LOOKED_AT = 20_000  # pictures that are checked, at most
_EACH_SECOND, _AT_LEAST = 3, 1000  # pictures that are checked for a second of the time for everything, and in any case
_SHARE, _FEWEST, _MOST = 0.05, 8, 500  # of pictures that are held out
_A_MINUTE = 5  # held out for a minute of the time, and 50 more: each is looked at several times
_LEAST_HELD_OUT = 4
_LISTED = 50  # names in the record, per finding
_RECORD = "split.json"


@dataclass(frozen=True)
class Split:
    """Folders ``train`` and ``held_out``, as every verb takes them.

    Attributes:
        folder: of the two.
        record: numbers of pictures (``train``, ``held_out``), ``classes``, the median of the short ``side``,
            ``left_out`` and ``findings``, each by reason with count and names; ``of``, where fewer are used.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def train(self) -> Path:
        """Those that are trained on."""
        return self.folder / (f"train_{self.images}" if "of" in self.record else "train")

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out"

    @property
    def judged_by(self) -> Path:
        """Those that are held out, without classes where they lack some of those that are trained on: evaluation takes
        the same classes on both sides, or none on one."""
        if not self.classes or {p.name for p in self.held_out.iterdir()} == {p.name for p in self.train.iterdir()}:
            return self.held_out
        plain = self.folder / "held_out_without_classes"
        plain.mkdir(exist_ok=True)
        for number, file in enumerate(sorted(self.held_out.glob("*/*"))):
            link = plain / f"{number:05d}{file.suffix}"
            if not link.is_symlink():
                os.symlink(os.path.relpath(file, plain), link)
        return plain

    @property
    def images(self) -> int:
        """Pictures that are trained on."""
        return int(self.record["train"])

    @property
    def classes(self) -> int:
        """0 without labels."""
        return len(self.record["classes"])

    def limited_to(self, count: int | None) -> int:
        """How many pictures ``limited`` leaves."""
        return self.images if count is None else min(self.images, max(count, self.classes))

    def limited(self, count: int | None, seed: int) -> Split:
        """With ``count`` pictures to train on, of every class its share and one at least; links in a folder of their
        own, where that is fewer than there are."""
        count = self.limited_to(count)
        if count == self.images:
            return self
        some = Split(self.folder, {**self.record, "train": count, "of": self.images})
        if some.train.exists():
            return some
        groups = [sorted(folder.iterdir()) for folder in sorted(self.train.iterdir())] if self.classes else [
            sorted(self.train.iterdir())
        ]  # fmt: skip
        random = np.random.default_rng(seed)
        places = [(place / len(group) if place else -1.0, random.random(), group[row])
                  for group in groups for place, row in enumerate(random.permutation(len(group)).tolist())]  # fmt: skip
        part = some.train.with_name(f"{some.train.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        for _, _, file in sorted(places)[: some.images]:
            link = part / file.relative_to(self.train)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.path.relpath(file, some.train / link.parent.relative_to(part)), link)
        part.rename(some.train)
        return some


def make_split(options: Photographs, folder: Path, seed: int, seconds: float) -> Split:
    """Check the pictures and sort them into ``folder``; a split that is complete is taken as it is.

    Args:
        options: the pictures.
        folder: to write.
        seed: of the choice.
        seconds: for everything: in little time few of many pictures are checked and held out.

    Raises:
        ValueError: no such data, or too few usable pictures.
    """
    if (folder / _RECORD).exists():
        return Split(folder, read_json(folder / _RECORD, "delete the folder"))
    source = load_source(options.data, options.reading())
    _check_count(options.data, len(source))
    most = min(_LOOKED_AT, max(_AT_LEAST, round(_EACH_SECOND * seconds)))
    looked = source if len(source) <= most else _part(source, choose_rows(len(source), most))
    report = check_images(looked, 32, 32)
    bad = _unusable(looked, report)
    kept = np.array([i for i in range(len(source)) if int(source.chosen[i]) not in bad])
    _check_count(options.data, len(kept), f", {len(bad)} more cannot be used ({_why(report)})")
    held = _hold_out(source.labels[kept], options.held_out, seed, round(50 + _A_MINUTE * seconds / 60))
    if held.sum() < _LEAST_HELD_OUT:
        raise ValueError(
            f"{options.data} has {len(source.class_names)} classes of a picture or two each, so none can be held out: "
            "put pictures of a kind into one folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    names = _folder_names(source.class_names)
    for name, rows in (("train", kept[~held]), ("held_out", kept[held])):
        for row in rows.tolist():
            _place(source, row, folder / name / names[source.labels[row]] if names else folder / name)
    record = {
        "train": int((~held).sum()),
        "held_out": int(held.sum()),
        "classes": names,
        "checked": len(looked),
        "side": median(min(size) for size in report.sides.elements()),
        "found": source.note,
        "left_out": {reason: _listed(files) for reason, files in source.left_out.items()},
        "findings": {kind: _listed(_by_name(lines, options.data)) for kind, lines in report.findings.items()},
    }
    write_atomically(folder / _RECORD, (json.dumps(record, indent=1) + "\n").encode())
    return Split(folder, record)


def _check_count(data: str, count: int, more: str = "") -> None:
    if count < LEAST:
        raise ValueError(
            f"{data} has {count} usable pictures{more}; a model needs {LEAST} at least, and some hundred to be of use: "
            "add pictures"
        )


def _part(source: ImageSource, rows: np.ndarray) -> ImageSource:
    return replace(source, chosen=source.chosen[rows], labels=source.labels[rows])


def _unusable(source: ImageSource, report: DataReport) -> set[int]:
    """Rows of pictures that are broken, or copies of one before them."""
    rows = {source.path(i): int(source.chosen[i]) for i in range(len(source))}
    found: set[int] = set()
    for kind, end in ((BROKEN, ": "), ("duplicate", ": as "), ("same pixels", ": as ")):
        for line in report.findings.get(kind, ()):
            places = [match.start() for match in re.finditer(re.escape(end), line)]
            found |= {rows[line[:place]] for place in places if line[:place] in rows}
    return found


def _why(report: DataReport) -> str:
    kinds = {kind: report.findings.get(kind, []) for kind in (BROKEN, "duplicate", "same pixels")}
    return "; ".join(f"{kind}: {len(lines)}, such as {lines[0]}" for kind, lines in kinds.items() if lines) or "none"


def _hold_out(labels: np.ndarray, count: int | None, seed: int, most: int) -> np.ndarray:
    """Which of the pictures (N,) are held out: a seeded choice that leaves every class half of its pictures. First one
    of every class that has two, as far as that goes."""
    total = len(labels)
    wanted = count if count is not None else min(_MOST, most, max(_FEWEST, round(_SHARE * total)))
    held, left = np.zeros(total, bool), np.bincount(labels) // 2
    order = np.random.default_rng(seed).permutation(total).tolist()
    firsts = [order[place] for place in sorted(np.unique(labels[order], return_index=True)[1].tolist())]
    for row in [*firsts, *order]:
        if not held[row] and held.sum() < min(wanted, total // 3) and left[labels[row]] > 0:
            held[row] = True
            left[labels[row]] -= 1
    return held


def _folder_names(names: tuple[str, ...]) -> list[str]:
    """A folder for each class: no separators, no leading dot, no name twice."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[/\\\0]", "-", name).lstrip(".") or "class"
        number = sum(other.casefold() == plain.casefold() for other in found)
        found.append(f"{plain} ({number + 1})" if number else plain)
    return found


def _place(source: ImageSource, row: int, folder: Path) -> None:
    """A link where the picture is a file, else its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, number = source.rows, int(source.chosen[row])
    if isinstance(rows, FolderRows):
        file = rows.files[number]
        os.symlink(file.resolve(), folder / f"{number:07d}{file.suffix.lower()}")
        return
    data = source.read(row)
    with Image.open(io.BytesIO(data)) as image:
        suffix = str(image.format).lower()
    (folder / f"{number:07d}.{suffix}").write_bytes(data)


def _by_name(lines: list[str], data: str) -> list[str]:
    """Findings without the place of the data on this machine: the report is published."""
    places = {f"{data.rstrip('/')}/", f"{Path(data).expanduser().absolute()}/"}
    for place in places:
        lines = [line.replace(place, "") for line in lines]
    return lines


def _listed(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "names": names[:_LISTED]}
