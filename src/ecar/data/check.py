"""What is wrong, or worth knowing, with the images of a data set, before anything is trained on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ecar.data.ahead import in_order
from ecar.data.source import ImageSource
from ecar.files.colour import profile_kind
from ecar.files.images import NARROW, BadImageError, contrast, decode_image, open_image, white_level

BROKEN = "broken"


@dataclass(kw_only=True)
class DataReport:
    """Findings of ``check_images``.

    Attributes:
        images: number of images looked at.
        classes: images per class name; empty for unlabelled data.
        sides: how often each (width, height) occurs.
        findings: per kind, one line per image with its path and what was found.
    """

    images: int
    classes: dict[str, int]
    sides: Counter[tuple[int, int]] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, line: str) -> None:
        """Note a finding."""
        self.findings.setdefault(kind, []).append(line)


def check_images(source: ImageSource, height: int, width: int) -> DataReport:
    """Look at every image.

    Kinds: "broken" (unreadable, or over the pixel limit: training skips them), "tiny" (smaller than (height, width):
    training enlarges them), "16-bit", "CMYK", "palette", "alpha", "animated", "colour profile" (training converts
    them), "colour profile ignored" (damaged, or of other pixels), "damaged after the first frame", "narrow range" (a
    tenth of it or less: blank, or of another scale than its format's), "clipped" (more than 1% of the values are
    outside the range that they are read with), "another range" (most are read with another one), "duplicate" (same
    bytes) and "same pixels" (another file of an equal picture).
    """
    report = DataReport(images=len(source), classes=source.classes())
    bytes_seen: dict[bytes, int] = {}
    pixels_seen: dict[bytes, int] = {}
    whites: dict[int, float] = {}
    looks = in_order(_look, source.encoded())
    for (index, _), look in tqdm(looks, total=len(source), desc="checking", disable=None):
        path = source.path(index)
        if isinstance(look, BadImageError):
            report.add(BROKEN, f"{path}: {look}")
            continue
        report.sides[look.size] += 1
        if look.size[0] < width or look.size[1] < height:
            report.add("tiny", f"{path}: {look.size[0]}x{look.size[1]}")
        for kind in look.kinds:
            report.add(kind, path)
        if (first := bytes_seen.setdefault(look.bytes_hash, index)) != index:
            report.add("duplicate", f"{path}: as {source.path(first)}")
        elif (first := pixels_seen.setdefault(look.pixels_hash, index)) != index:
            report.add("same pixels", f"{path}: as {source.path(first)}")
        if look.white is not None:
            whites[index] = look.white
    if whites:
        (common, _), *_ = Counter(whites.values()).most_common(1)
        for index, white in whites.items():
            if white != common:
                report.add("another range", f"{source.path(index)}: read as 0..{white:g}, most as 0..{common:g}")
    return report


class _Look(NamedTuple):
    """What one image shows: (width, height), kinds, SHA-256 of its bytes and of its size and pixels, and the value that
    was taken for white where the format leaves that open."""

    size: tuple[int, int]
    kinds: list[str]
    bytes_hash: bytes
    pixels_hash: bytes
    white: float | None


def _look(encoded: tuple[int, bytes | BadImageError]) -> _Look:
    image, data = decode_image(encoded[1]), encoded[1]
    assert not isinstance(data, BadImageError)  # decode_image has raised it
    pixels = repr(image.size).encode() + image.tobytes()
    kinds, white = _kinds(data)
    if contrast(image) <= NARROW:
        kinds.append("narrow range")
    return _Look(image.size, kinds, hashlib.sha256(data).digest(), hashlib.sha256(pixels).digest(), white)


def _kinds(data: bytes) -> tuple[list[str], float | None]:
    """Of an image that can be decoded; and its white, of mode F and I."""
    with open_image(data) as image:
        mode, white = image.mode, None
        found = {
            "16-bit": mode.startswith("I") or mode == "F",
            "CMYK": mode == "CMYK",
            "palette": mode == "P",
            "alpha": "A" in mode or "transparency" in image.info,
        }
        if profile := image.info.get("icc_profile"):
            found[str(profile_kind(profile, mode))] = profile_kind(profile, mode) is not None
        try:  # the further images of an MPO are another view or size of the same photograph
            found["animated"] = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
        except Exception:  # Pillow raises many types; training takes the first frame, which was read
            found["damaged after the first frame"] = True
        if mode in ("F", "I"):
            values = np.asarray(image)
            white = white_level(values, mode)
            found["clipped"] = bool(((values < 0) | (values > white)).mean() > 0.01)
    return [kind for kind, is_so in found.items() if is_so], white
