"""The samples of a tar: which members are images, and which of the others belong to them."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ecar.data.formats import is_image
from ecar.data.labels import as_id
from ecar.data.rows import printable

_SIDES = ("cls", "json", "txt")
_MAX_LABEL_BYTES = 1 << 20
_BLOCK = 512
_FIELD = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")  # "seg" of 0001.seg.png, no "30.01" of a time


@dataclass(frozen=True)
class Member:
    """One sample of a tar: its key, where its image lies (bytes), and its label as the tar has it."""

    key: str
    offset: int
    size: int
    label: int | str | None


@dataclass(frozen=True)
class Samples:
    """The samples of a tar in its order, and the members that belong to none, by reason."""

    members: list[Member]
    left_out: dict[str, list[str]]


class _Image(NamedTuple):
    """An image of a tar, whose name is ``base``, up to its first dot, and ``ending``; ``key`` has all but the last
    suffix."""

    base: str
    ending: str
    key: str
    offset: int
    size: int

    @property
    def middle(self) -> str:
        """What is between base and last suffix: "seg" of seg.png."""
        return self.key[len(self.base) + 1 :]


@dataclass
class _Contents:
    """What a tar holds."""

    images: list[_Image] = field(default_factory=list)
    labels: dict[str, int | str | None] = field(default_factory=dict)  # by key: None for a side file without a label
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(printable(name))


def scan_tar(tar: Path, image_column: str | None = None, label_column: str | None = None) -> Samples:
    """The samples of a tar, from its headers. The suffix of a name is what follows its last dot. Where samples hold
    several files, as WebDataset writes them (0001.jpg, 0001.seg.png, 0001.cls), the plain one is the image.

    Args:
        image_column: the end of the names that are images, such as "jpg" or "seg.png".
        label_column: "cls", "txt", or a field of the .json; default: .cls, or "label" in the .json.

    Raises:
        ValueError: not a plain tar, cut off (with the offset), a name that leads outside, doubt about the image of a
            sample.
    """
    contents = _Contents()
    with _whole(tar) as archive:
        for info in archive:
            name = PurePosixPath(info.name)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{tar}: member {info.name!r} at offset {info.offset} leads outside the tar; refused")
            if not info.isdir():
                _sort_in(contents, archive, info, label_column, f"{tar}: {info.name} at offset {info.offset}")
    images = contents.images
    if image_column is None:
        images = _plain(contents, tar)
    else:
        images = [named for i in images if (named := _named(i, image_column.lower().lstrip("."))) is not None]
    used = {image.offset for image in images}
    for image in contents.images:
        if image.offset not in used:
            contents.leave("further images of samples", f"{image.base}.{image.ending}")
    alone = {image.key for image in images}
    labels = [contents.labels.get(i.key, None if i.base in alone else contents.labels.get(i.base)) for i in images]
    members = [Member(i.key, i.offset, i.size, label) for i, label in zip(images, labels, strict=True)]
    return Samples(members, contents.left_out)


@contextmanager
def _whole(tar: Path) -> Iterator[tarfile.TarFile]:
    """A tar to read from start to end. ValueError where it has no end."""
    archive: tarfile.TarFile | None = None
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive
            # tarfile takes a cut or a damaged header for the end; the true end is a block of zeros.
            file.seek(archive.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError) as error:
        offset = archive.offset if archive is not None else 0
        raise ValueError(f"{tar}: damaged or cut off at offset {offset} ({error}); copy it again") from None


def _sort_in(
    contents: _Contents, archive: tarfile.TarFile, info: tarfile.TarInfo, label_column: str | None, where: str
) -> None:
    """One member to the images, the labels, or what is left out."""
    name = PurePosixPath(info.name)
    if any(part.startswith(".") for part in name.parts):
        return contents.leave("hidden", info.name)
    if not info.isreg():
        return contents.leave("links inside a tar", info.name)
    key, suffix = str(name.with_suffix("")), name.suffix.lower().removeprefix(".")
    if suffix in _SIDES:
        if info.size <= _MAX_LABEL_BYTES:
            text = archive.extractfile(info)
            assert text is not None  # a regular file
            label = _label(text.read(), suffix, label_column, where)
            contents.labels[key] = contents.labels.get(key) if label is None else label
        else:
            contents.leave("side files of more than a megabyte", info.name)
        return None
    file = archive.extractfile(info)
    assert file is not None
    if not is_image(name.name, file):
        return contents.leave("no images", info.name)
    stem, _, ending = name.name.partition(".")
    base = str(name.with_name(stem))
    contents.images.append(_Image(base, ending.lower(), key, info.offset_data, info.size))
    return None


def _plain(contents: _Contents, tar: Path) -> list[_Image]:
    """The image of each sample, in the order of the tar.

    Names with several dots are fields of one sample (0001.seg.png) or pictures of their own (a time, 10.30.01.jpg):
    fields are words, and come again in other samples or beside a side file of the sample.
    """
    groups: dict[str, list[_Image]] = {}
    for image in contents.images:
        groups.setdefault(image.base, []).append(image)
    often = Counter(image.ending for image in contents.images)
    dropped: set[int] = set()
    for base, group in groups.items():
        seen: dict[str, _Image] = {}
        for image in group:
            if (first := seen.setdefault(image.key, image)) is not image:
                raise ValueError(
                    f"{tar}: a second image of {image.key!r} at offset {image.offset}; name one of "
                    f"{first.ending}, {image.ending} with --image-column"
                )
        fields = [i for i in group if _is_field(i, contents, often)]
        if base in seen:
            dropped |= {image.offset for image in fields}
        elif len(fields) > 1:
            endings = ", ".join(image.ending for image in fields)
            raise ValueError(f"{tar}: {endings} of {base!r} may each be the image; name one with --image-column")
    return [image for image in contents.images if image.offset not in dropped]


def _is_field(image: _Image, contents: _Contents, often: Counter[str]) -> bool:
    """Whether an image is one of the files of a sample, and no picture of its own."""
    if not _FIELD.fullmatch(image.middle.lower()) or image.key in contents.labels:
        return False
    return image.base in contents.labels or often[image.ending] > 1


def _named(image: _Image, ending: str) -> _Image | None:
    """The image with the key of its sample where its name ends so; None where not."""
    if image.ending == ending:
        return image._replace(key=image.base)
    return image if image.ending.endswith(f".{ending}") and not _FIELD.fullmatch(image.middle.lower()) else None


def _label(data: bytes, suffix: str, column: str | None, where: str) -> int | str | None:
    """The label in a side file; None where it has none."""
    wanted = {"cls", "json"} if column is None else {column} if column in ("cls", "txt") else {"json"}
    if suffix not in wanted:
        return None
    try:
        text = data.decode("utf-8").strip()
        value = json.loads(text) if suffix == "json" else text
    except ValueError as error:
        raise ValueError(f"{where}: not readable as a label ({error})") from None
    if suffix == "json":
        value = value.get(column or "label") if isinstance(value, dict) else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise ValueError(f"{where}: the label is {value!r}, not a class id or name")
    return as_id(value) if value != "" else None
