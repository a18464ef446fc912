"""PIL images -> bytes of the formats that the API knows."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ecar.serving.order import Order


def encode(image: Image.Image, order: Order, *, seed: int | None = None) -> str:
    """``encode_bytes`` in base64."""
    return base64.b64encode(encode_bytes(image, order, seed=seed)).decode()


def encode_bytes(
    image: Image.Image, order: Order, *, frames: Sequence[Image.Image] = (), seed: int | None = None
) -> bytes:
    """An image in the format and size of the order.

    Args:
        image: a preview, which may be smaller, or the final image.
        frames: what comes before it in a gif.
        seed: goes into the metadata of a png, with class and settings: the image can be made again.
    """
    image, buffer = _fit(image, order), io.BytesIO()
    if order.format == "gif":
        durations = [order.frame_ms] * len(frames) + [max(order.frame_ms, 2000)]
        earlier = [_fit(frame, order) for frame in frames]
        first, *rest = [*earlier, image]
        first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    elif order.format == "png":
        info = PngInfo()
        if seed is not None:
            record: dict[str, Any] = {"class": order.class_name, "seed": seed, "settings": order.settings.to_json()}
            if order.redraw is not None:
                record["strength"] = order.redraw.strength
            info.add_itxt("ecar", json.dumps(record))
        image.save(buffer, "PNG", pnginfo=info)
    elif order.format == "jpeg":
        image.save(buffer, "JPEG", quality=max(1, order.compression))
    else:
        image.save(buffer, "WEBP", quality=order.compression)
    return buffer.getvalue()


def _fit(image: Image.Image, order: Order) -> Image.Image:
    return image if image.size == order.size else image.resize(order.size, Image.Resampling.BICUBIC)
