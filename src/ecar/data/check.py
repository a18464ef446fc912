"""What is wrong, or worth knowing, with the images of a data set, before anything is trained on them."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image
from tqdm.auto import tqdm

from ecar.data.ahead import in_order
from ecar.data.source import ImageSource
from ecar.files.images import BadImageError, decode_image

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
    training enlarges them), "16-bit", "CMYK", "palette", "alpha", "animated" (training converts them), "damaged after
    the first frame", "duplicate" (same bytes) and "same pixels" (another file of an equal picture).
    """
    names, counts = source.class_names, Counter(source.labels.tolist())
    report = DataReport(images=len(source), classes={name: counts[i] for i, name in enumerate(names)})
    bytes_seen: dict[bytes, int] = {}
    pixels_seen: dict[bytes, int] = {}
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
    return report


class _Look(NamedTuple):
    """What one image shows: (width, height), kinds, SHA-256 of its bytes and of its size and pixels."""

    size: tuple[int, int]
    kinds: list[str]
    bytes_hash: bytes
    pixels_hash: bytes


def _look(encoded: tuple[int, bytes | BadImageError]) -> _Look:
    image, data = decode_image(encoded[1]), encoded[1]
    assert not isinstance(data, BadImageError)  # decode_image has raised it
    pixels = repr(image.size).encode() + image.tobytes()
    return _Look(image.size, _kinds(data), hashlib.sha256(data).digest(), hashlib.sha256(pixels).digest())


def _kinds(data: bytes) -> list[str]:
    with Image.open(io.BytesIO(data)) as image:
        mode = image.mode
        found = {
            "16-bit": mode.startswith("I") or mode == "F",
            "CMYK": mode == "CMYK",
            "palette": mode == "P",
            "alpha": "A" in mode or "transparency" in image.info,
        }
        try:
            found["animated"] = getattr(image, "n_frames", 1) > 1
        except Exception:  # Pillow raises many types; training takes the first frame, which was read
            found["damaged after the first frame"] = True
    return [kind for kind, is_so in found.items() if is_so]
