"""Which files are pictures: by their suffix, or by content where it is another; every format that Pillow opens."""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePath
from typing import IO

from PIL import Image, UnidentifiedImageError

# A file of these suffixes is an image, and a broken one where it cannot be decoded.
IMAGE_SUFFIXES = frozenset((
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".qoi"),
))  # fmt: skip
# Not worth a look inside: there may be one of them beside every image.
_OTHERS = frozenset((
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".yaml", ".yml", ".html", ".py", ".log", ".ini"),
    *(".npy", ".npz", ".cls", ".parquet", ".tar", ".zip", ".db"),
))  # fmt: skip
_NEVER_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow opens them, but decodes none


@lru_cache
def _formats(suffix: str) -> tuple[str, ...]:
    """Formats to try. Those without a mark at the start (TGA) would take other files for theirs: by suffix only."""
    own = Image.registered_extensions().get(suffix)  # which loads every plugin
    marked = [name for name, (_, accept) in Image.OPEN.items() if accept is not None and name not in _NEVER_DECODED]
    return tuple(marked if own is None or own in marked or own in _NEVER_DECODED else [own, *marked])


def is_image(name: str, file: str | PurePath | IO[bytes]) -> bool:
    """Whether a file of this name and content is a picture. OSError where it cannot be read."""
    suffix = PurePath(name).suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in _OTHERS:
        return suffix in IMAGE_SUFFIXES
    try:
        with Image.open(file, formats=_formats(suffix)):
            return True
    except Image.DecompressionBombError:
        return True
    except UnidentifiedImageError:
        return False
    except OSError as error:
        if error.errno is not None:
            raise
        return False
    except Exception:  # Pillow raises many types for what is none of its formats
        return False
