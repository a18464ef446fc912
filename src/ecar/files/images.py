"""Files and bytes -> RGB arrays of one size. Every pixel format has a defined result; nothing is clipped silently."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow warns from here on; a file of a few kilobytes can ask for more than there is memory
# The error below says it. Once for all: images are decoded on threads, for which ``catch_warnings`` is not safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# The rule of ``fit``; another rule gets another name: latents of one crop are no latents of another.
CROP = "cover-bicubic-centre-1"


Picture = Image.Image | str | Path  # a picture, or its file


class BadImageError(ValueError):
    """An image that cannot be used; the message says why."""


def decode_image(data: bytes | BadImageError) -> Image.Image:
    """Bytes of any format that Pillow reads -> RGB image, upright (EXIF), 8 bits; or the reason why there are none.

    16-bit and floating-point images are scaled, not clipped (Pillow's ``convert`` clips them); transparent pixels
    are laid over white; of an animation the first frame is taken.

    Raises:
        BadImageError: empty, truncated, not an image, not finite, or of more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(data, BadImageError):
        raise data
    try:
        opened = Image.open(io.BytesIO(data))
        if opened.width * opened.height > MAX_PIXELS:
            raise BadImageError(f"has {opened.width}x{opened.height} pixels, more than {MAX_PIXELS:,}")
        opened.load()
        return _to_rgb(ImageOps.exif_transpose(opened))
    except BadImageError:
        raise
    except Exception as error:  # Pillow raises many types for broken files: OSError, SyntaxError, struct.error, ...
        reason = re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error))  # the same words every time
        raise BadImageError(f"cannot be decoded ({type(error).__name__}: {reason})") from error


def read_image(source: Picture) -> Image.Image:
    """A picture or its file -> RGB image, as ``decode_image`` gives it.

    Raises:
        BadImageError: naming the file: there is none, or it cannot be used.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(source))
    try:
        return decode_image(Path(source).expanduser().read_bytes())
    except OSError as error:
        raise BadImageError(f"{source}: cannot be read ({error.strerror})") from None
    except BadImageError as error:
        raise BadImageError(f"{source}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit and 32-bit whole numbers: 255 or 65535 is white, whichever holds them; beyond it, and for floats beyond
    1, the largest value is."""
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("pixels that are not finite")
    top = float(wide.max(initial=0.0))
    steps = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0) if mode == "I" else (65535.0,)
    white = next((step for step in steps if top <= step), top)
    return np.round(np.clip(wide / white, 0, 1) * 255).astype(np.uint8)


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale to cover ``height`` x ``width`` (antialiased bicubic), crop the centre: (height, width, 3) uint8."""
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def to_signed(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0
