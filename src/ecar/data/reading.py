"""How data are to be read: the options that every verb with ``--data`` shares."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ecar.files.options import flag


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options that say which part of the data are images and labels."""

    split: str = "train"
    """Split of data that have several."""
    image_column: str | None = None
    """Column of the images; in tars the end of their names, such as jpg or seg.png. Default: image, img, jpg, ..."""
    label_column: str | None = None
    """Column of the labels, of a table, of metadata.jsonl or metadata.csv; in tars a field of .json, or cls or txt.
    Default: label, labels, fine_label, class, ..."""

    def reading(self, **changes: Any) -> ReadOptions:
        """These options alone, without those of the verb."""
        return ReadOptions(**{f.name: getattr(self, f.name) for f in fields(ReadOptions)} | changes)

    def check_unused(self, data: str, what: str) -> None:
        """ValueError where one of these is given and ``what`` the data are has neither splits nor columns."""
        for field in fields(ReadOptions):
            if getattr(self, field.name) != getattr(type(self), field.name):  # its default
                raise ValueError(f"{flag(field.name)} would change nothing: {data} is {what}; leave it out")


def add_left_out(left_out: dict[str, list[str]], more: dict[str, list[str]]) -> None:
    """Add the names of ``more``, by reason."""
    for reason, names in more.items():
        left_out.setdefault(reason, []).extend(names)


def shortened(names: list[str], most: int) -> str:
    """The first names, and how many follow."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", ... and {rest:,} more" if rest > 0 else "")
