"""Files and bytes -> RGB arrays of one size. Every pixel format has a defined result; nothing is clipped silently."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # Pillow raises above this; below, but large, it only warns


class BadImageError(ValueError):
    """An image that cannot be used; the message says why."""


def decode_image(data: bytes) -> Image.Image:
    """Bytes of any format that Pillow reads -> RGB image, upright (EXIF), 8 bits.

    16-bit and floating-point images are scaled, not clipped (Pillow's ``convert`` clips them); transparent pixels
    are laid over white; of an animation the first frame is taken.

    Raises:
        BadImageError: empty, truncated, not an image, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
            opened.load()
            image: Image.Image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow raises many types for broken files: OSError, SyntaxError, struct.error, ...
        raise BadImageError(f"cannot be decoded ({type(error).__name__}: {error})") from error
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    wide = values.astype(np.float64)
    if mode == "F":
        top = 1.0 if wide.max(initial=0.0) <= 1.0 else 255.0
    else:  # mode I holds 16-bit PNGs too; a small range in it means 8-bit values
        top = 255.0 if mode == "I" and wide.max(initial=0.0) <= 255 else 65535.0
    return np.round(np.clip(wide / top, 0, 1) * 255).astype(np.uint8)


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale to cover ``height`` x ``width`` (antialiased bicubic), crop the centre: (height, width, 3) uint8."""
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def to_signed(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0
