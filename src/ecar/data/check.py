"""What is wrong, or worth knowing, with the images of a data set, before anything is trained on them."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field

from PIL import Image
from tqdm.auto import tqdm

from ecar.data.images import BadImageError, decode_image
from ecar.data.source import ImageSource

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
    training enlarges them), "16-bit", "CMYK", "palette", "alpha", "animated" (training converts them), "duplicate"
    (same bytes) and "same pixels" (another file of an equal picture).
    """
    names, counts = source.class_names, Counter(source.labels.tolist())
    report = DataReport(images=len(source), classes={name: counts[i] for i, name in enumerate(names)})
    bytes_seen: dict[bytes, str] = {}
    pixels_seen: dict[bytes, str] = {}
    for index in tqdm(range(len(source)), desc="checking", disable=None):
        path = source.path(index)
        try:
            data = source.read(index)
            image = decode_image(data)
        except (BadImageError, OSError) as error:
            report.add(BROKEN, f"{path}: {error}")
            continue
        report.sides[image.size] += 1
        if image.width < width or image.height < height:
            report.add("tiny", f"{path}: {image.width}x{image.height}")
        for kind in _kinds(data):
            report.add(kind, path)
        if (first := bytes_seen.setdefault(hashlib.sha256(data).digest(), path)) != path:
            report.add("duplicate", f"{path}: as {first}")
        elif (first := pixels_seen.setdefault(hashlib.sha256(image.tobytes()).digest(), path)) != path:
            report.add("same pixels", f"{path}: as {first}")
    return report


def _kinds(data: bytes) -> list[str]:
    with Image.open(io.BytesIO(data)) as image:
        mode = image.mode
        found = {
            "16-bit": mode.startswith("I") or mode == "F",
            "CMYK": mode == "CMYK",
            "palette": mode == "P",
            "alpha": "A" in mode or "transparency" in image.info,
            "animated": getattr(image, "n_frames", 1) > 1,
        }
    return [kind for kind, is_so in found.items() if is_so]
