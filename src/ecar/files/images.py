"""Files and bytes -> RGB arrays of one size. Every pixel format has a defined result; nothing is clipped silently."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ecar.files.colour import to_srgb

MAX_PIXELS = 89_478_485  # Pillow warns from here on; a file of a few kilobytes can ask for more than there is memory
# The error below says it. Once for all: images are decoded on threads, for which ``catch_warnings`` is not safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow refuses a PNG with more than a megabyte of text, such as the workflow of a program that drew it.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26

# The rule of ``decode_image`` and ``fit``; another rule gets another name: latents of one are no latents of another.
CROP = "cover-bicubic-centre-2"

NARROW = 25  # of 255: what uses no more of its range, a tenth, shows nearly nothing
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes of 16 bits and more
# What may be white in the other two; I;16 is always 0..65535.
_WHITES = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0, 2.0**31 - 1)}
_OVER = 2.0  # sharpening and resampling overshoot: a range holds values up to twice its white
_ORIENTATION = 0x0112  # the tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Picture = Image.Image | str | Path  # a picture, or its file


class BadImageError(ValueError):
    """An image that cannot be used; the message says why."""


def decode_image(
    data: bytes | BadImageError, *, most: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Bytes of any format that Pillow reads -> RGB image in sRGB, upright (EXIF), 8 bits; or the reason why there are
    none.

    16-bit and floating-point images are scaled (``white_level``), not clipped (Pillow's ``convert`` clips them); a
    colour profile is applied; transparent pixels are laid over white, or over black where white hides all; of an
    animation the first frame is taken.

    Args:
        data: of a file.
        most: pixels that it may have, default ``MAX_PIXELS``; where it has more, they are not read.
        formats: as Pillow names them, recognized by the content; None: all.

    Raises:
        BadImageError: empty, truncated, not an image of these formats, not finite, of no known range, or of more than
            ``most`` pixels.
    """
    return _decoded(data, most, formats, lambda opened: _to_rgb(_upright(opened)))


def load_image(data: bytes, *, most: int | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """As ``decode_image``, but with mode, transparency and turn as they are in the file."""
    return _decoded(data, most, formats, lambda opened: opened)


def _decoded(
    data: bytes | BadImageError,
    most: int | None,
    formats: tuple[str, ...] | None,
    convert: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    if isinstance(data, BadImageError):
        raise data
    try:
        opened = open_image(data, formats)
        most = MAX_PIXELS if most is None else most
        if opened.width * opened.height > most:
            raise BadImageError(f"has {opened.width}x{opened.height} pixels, more than {most:,}")
        opened.load()
        return convert(opened)
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
        return _to_rgb(_upright(source))
    try:
        return decode_image(Path(source).expanduser().read_bytes())
    except OSError as error:
        raise BadImageError(f"{source}: cannot be read ({error.strerror})") from None
    except BadImageError as error:
        raise BadImageError(f"{source}: {error}") from error


def open_image(data: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The image in ``data``, its pixels not read yet; Pillow's errors where there is none of these formats."""
    return Image.open(io.BytesIO(data), formats=formats)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says. Nothing else is read of EXIF, and nothing written back: other fields may be
    damaged. EXIF that cannot be read turns nothing."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many types
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in _DEEP:
        return to_srgb(Image.fromarray(_to_8_bit(np.asarray(image), image.mode)), profile)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = to_srgb(image.convert("L") if grey else rgba.convert("RGB"), profile)
        return _over_paper(Image.merge("RGBA", (*rgb.split(), rgba.getchannel("A"))))
    return to_srgb(image if grey or image.mode == "CMYK" else image.convert("RGB"), profile)


def _over_paper(rgba: Image.Image) -> Image.Image:
    """Over white; over black where on white nearly nothing is left to see, and on black there is (a white glyph)."""
    white, black = (Image.new("RGBA", rgba.size, colour) for colour in ("white", "black"))
    laid = Image.alpha_composite(white, rgba).convert("RGB")
    if contrast(laid) > NARROW:
        return laid
    other = Image.alpha_composite(black, rgba).convert("RGB")
    return other if contrast(other) > NARROW else laid


def contrast(image: Image.Image) -> int:
    """The largest range of values of a channel of an RGB image, 0..255."""
    return max(high - low for low, high in image.getextrema())  # type: ignore[misc]


def white_level(values: np.ndarray, mode: str) -> float:
    """The value that is white. It is one of a few, so that two images of a data set do not differ by their maxima.

    16-bit images: 65535. Floats: 1, 255 or 65535; 32-bit whole numbers: 255, 65535 or 2^31 - 1: the smallest one of
    which no value is more than twice. Beyond it they are white: sharpening and resampling overshoot.

    Raises:
        ValueError: values that are not finite, or beyond every range.
    """
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite")
    if mode not in _WHITES:
        return 65535.0
    top = float(values.max(initial=0))
    for white in _WHITES[mode]:
        if top <= _OVER * white:
            return white
    raise ValueError(f"values up to {top:g} are of no known range; scale them to 0..1, 0..255 or 0..65535")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit and 32-bit whole numbers and floats, (H, W), from 0..white to 0..255."""
    return np.round(np.clip(values.astype(np.float64) / white_level(values, mode), 0, 1) * 255).astype(np.uint8)


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale to cover ``height`` x ``width`` (antialiased bicubic), crop the centre: (height, width, 3) uint8."""
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def to_signed(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0
