"""Colour profiles (ICC): pixels of Display P3, Adobe RGB, inks or grey curves -> sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode of the pixels it describes
_SAME = 4  # of 255: profiles of sRGB differ by as much from each other; their pixels are left as they are


class _Profile(NamedTuple):
    """Mode of the pixels that a profile describes, and the way to sRGB; None where they are sRGB already."""

    mode: str
    transform: ImageCms.ImageCmsTransform | None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, RGB or CMYK -> RGB in sRGB. Without a profile, with one of sRGB, and with one that cannot be
    read or is of other pixels, it is Pillow's ``convert``."""
    known = _read(profile) if profile else None
    if known is None or known.transform is None or not _describes(known, image.mode):
        return image.convert("RGB")
    converted = known.transform.apply(image.convert(known.mode))
    converted.info.pop("icc_profile", None)  # lcms's own: the caller asked for pixels
    return converted


def profile_kind(profile: bytes, mode: str) -> str | None:
    """What a profile means for pixels of a mode, in words; None where it changes nothing."""
    known = _read(profile)
    if known is None or not _describes(known, "L" if mode[0] in "LIF" else mode):
        return "colour profile ignored"
    return None if known.transform is None else "colour profile"


def _describes(profile: _Profile, mode: str) -> bool:
    """Grey pixels may have a profile of RGB: they are three equal channels of it."""
    if "CMYK" in (mode, profile.mode):
        return mode == profile.mode
    return profile.mode == "RGB" or mode == "L"


@lru_cache(32)  # the images of a data set share a few profiles
def _read(profile: bytes) -> _Profile | None:
    """None where it cannot be read. Perceptual, as browsers do it."""
    try:
        read = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[read.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            read, ImageCms.createProfile("sRGB"), mode, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
        return _Profile(mode, None if mode != "CMYK" and _changes_nothing(transform) else transform)
    except Exception:  # lcms raises many types for damaged profiles, and some kinds of profile are of no image
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """To all greys, or to a grid of 17 values a channel, no more than ``_SAME``."""
    if transform.input_mode == "L":
        values = np.arange(256, dtype=np.uint8)[None]
    else:
        steps = np.linspace(0, 255, 17).round().astype(np.uint8)
        values = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(17, -1, 3)
    probe = Image.fromarray(values)
    before, after = (np.asarray(image, np.int16) for image in (probe.convert("RGB"), transform.apply(probe)))
    return bool(np.abs(after - before).max() <= _SAME)
