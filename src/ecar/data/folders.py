"""What lies in a folder: images, tables, tars, side files, and what is none of these. Folders of images as rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ecar.data.formats import IMAGE_SUFFIXES, is_image
from ecar.data.labels import SIDE_FILES, nfc, side_labels
from ecar.data.reading import ReadOptions, add_left_out, shortened
from ecar.data.rows import FolderRows, Opened, natural_key, printable

# Names that mean the same split; the first of each is the one that is asked for.
_SPLITS = (
    frozenset(("train", "training")),
    frozenset(("test", "testing")),
    frozenset(("validation", "val", "valid", "dev")),
)
SPLITS = frozenset().union(*_SPLITS)


@dataclass(kw_only=True)
class Found:
    """The files under ``root``, each kind in natural order.

    Attributes:
        tops: names of the subfolders of ``root``.
        left_out: what is none of these, by reason.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    sides: list[Path] = field(default_factory=list)
    tops: set[str] = field(default_factory=set)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, *files: Path) -> None:
        """Note what is not read."""
        add_left_out(self.left_out, {reason: [self.name(file) for file in files]} if files else {})

    def name(self, file: Path) -> str:
        """As it is shown."""
        return printable(file.relative_to(self.root).as_posix())


def walk(root: Path) -> Found:
    """Everything under ``root``; hidden names are left out.

    Links to folders are followed, but every real folder is read once, where it is if that is under ``root``: a loop of
    links ends. Links to files that are not there are images that cannot be read.
    """
    found = Found(root=root)

    def refused(error: OSError) -> None:  # else ``os.walk`` passes over it without a word
        if Path(error.filename) == root:
            raise ValueError(f"{root}: cannot be read ({error.strerror})") from None
        found.leave(f"folders that cannot be read ({error.strerror})", Path(error.filename))

    seen: dict[tuple[int, int], str] = {}
    places = [root]  # and then links to folders, after all that is no link
    for place in places:
        for folder, subfolders, names in os.walk(place, onerror=refused):
            status = os.stat(folder)
            before = seen.setdefault((status.st_dev, status.st_ino), folder)
            if before != folder:
                same = f"{found.name(Path(folder))}: the same folder as {found.name(Path(before))}"
                add_left_out(found.left_out, {"folders met a second time": [same]})
                subfolders.clear()
                continue
            hidden = [name for name in (*subfolders, *names) if name.startswith(".")]
            found.leave("hidden", *(Path(folder, name) for name in sorted(hidden)))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            places += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
            found.tops |= set(subfolders) if Path(folder) == root else set()
            for name in sorted(names):
                if not name.startswith("."):
                    _sort_in(found, Path(folder, name))
    for kind in (found.images, found.tables, found.tars, found.sides):
        kind.sort(key=lambda file: natural_key(str(file.relative_to(root))))
    return found


def _sort_in(found: Found, file: Path) -> None:
    suffix = file.suffix.lower()
    try:
        usable = file.is_file() or (file.is_symlink() and suffix in IMAGE_SUFFIXES)
    except OSError as error:  # its folder may be listed, and not entered
        found.leave(f"cannot be read ({error.strerror})", file)
        return
    if not usable:
        found.leave("links to what is not there" if file.is_symlink() else "no files", file)
    elif suffix == ".parquet":
        found.tables.append(file)
    elif suffix == ".tar":
        found.tars.append(file)
    elif file.name in SIDE_FILES:
        found.sides.append(file)
    else:
        try:
            image, reason = is_image(file.name, file), "no images"
        except OSError as error:
            image, reason = False, f"cannot be read ({error.strerror})"
        if image:
            found.images.append(file)
        else:
            found.leave(reason, file)


def open_folder(found: Found, read: ReadOptions) -> Opened:
    """A folder of images. Labels: a side file (``side_labels``), else the first level of subfolders, if any.

    Raises:
        ValueError: no images, class folders beside loose images, or folders of splits.
    """
    root, files = found.root, found.images
    if not files:
        rest = f"; there: {_kinds(found.left_out)}" if found.left_out else ""
        raise ValueError(f"{root}: no images found (all that Pillow reads, parquet, or tars){rest}")
    if read.image_column is not None:
        raise ValueError(f"--image-column: {root} is a folder of images and has no columns; leave it out")
    rows = FolderRows(root, tuple(files))
    parts = [p.relative_to(root).parts for p in files]
    used = {names[0] for names in parts if len(names) > 1}
    _check_splits(root, used)
    side = side_labels(root, files, found.sides, read)
    if side is not None:
        add_left_out(found.left_out, side.left_out)
        note = f"labels: {side.source}" + ("; subfolders are no classes" if used else "")
        return Opened(rows=rows, labels=side.labels, note=note, left_out=found.left_out)
    found.leave("side files without labels", *found.sides)
    if not used:
        return Opened(rows=rows, labels=None, note="no subfolders, so no labels", left_out=found.left_out)
    if used <= {table.stem for table in found.tables if table.parent == root}:
        note = "no labels: subfolders are shards, each with a .parquet beside it"
        return Opened(rows=rows, labels=None, note=note, left_out=found.left_out)
    loose = [p for p in files if p.parent == root]
    if loose:
        raise ValueError(f"{root}: has class subfolders and loose images (such as {loose[0].name}); move those")
    empty = tuple(sorted((nfc(printable(name)) for name in found.tops - used), key=natural_key))
    if empty:
        add_left_out(found.left_out, {"folders without images, so no classes": list(empty)})
    labels = [nfc(printable(names[0])) for names in parts]
    return Opened(
        rows=rows, labels=labels, empty_classes=empty, note="labels: names of subfolders", left_out=found.left_out
    )


def _check_splits(root: Path, used: set[str]) -> None:
    """ValueError for folders of splits, which are no classes, alone or beside others."""
    splits = sorted(name for name in used if name.lower() in SPLITS)
    several = len({same for same in _SPLITS for name in splits if name.lower() in same}) > 1
    if splits and (len(splits) == len(used) or (several and any(n.lower() in _SPLITS[0] for n in splits))):
        raise ValueError(f"{root}: holds the splits {', '.join(splits)}, not classes; give one of those folders")


def _kinds(left_out: dict[str, list[str]]) -> str:
    return "; ".join(f"{reason}: {len(names):,} ({shortened(names, 3)})" for reason, names in left_out.items())


def of_split(files: list[Path], root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The files of a split, by the names of files and folders, and the others; all of them where no name mentions any
    split. Names that mean the same are the same split: training is train.

    Raises:
        ValueError: other splits are mentioned, this one is not.
    """

    if not re.fullmatch(r"[\w.-]+", split):
        raise ValueError(f"--split {split}: parts of splits are for data sets of the Hub; give one word, as of {root}")
    chosen = [f for f in files if is_of_split(f, root, split)]
    if not chosen and any(_mentions(f, root, SPLITS) for f in files):
        kind = files[0].suffix.removeprefix(".")
        names = shortened([f.relative_to(root).as_posix() for f in files], 5)
        raise ValueError(f"{root}: no {kind} file of the split {split!r} among {names}; choose another --split")
    return (chosen, [f for f in files if f not in set(chosen)]) if chosen else (files, [])


def is_of_split(file: Path, root: Path, split: str) -> bool:
    """Whether the name of a file, or of its folders under ``root``, has the split or a word that means the same."""
    return _mentions(file, root, {split.lower()}.union(*(same for same in _SPLITS if split.lower() in same)))


def _mentions(file: Path, root: Path, words: Iterable[str]) -> bool:
    """Words with their digits and without: ``train0.parquet`` is of the split train."""
    names = [part.lower() for part in file.relative_to(root).parts]
    found = {word for name in names for letters in ("[^a-z0-9]+", "[^a-z]+") for word in re.split(letters, name)}
    return not found.isdisjoint(words)
