"""PIL images -> the formats that the API knows."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ecar.serving.order import Order


def encode(image: Image.Image, order: Order, *, seed: int | None = None) -> str:
    """An image in the format and size of the order, in base64.

    Args:
        image: a preview, which may be smaller, or the final image.
        seed: goes into the metadata of a png, with class and settings: the image can be made again.
    """
    buffer = io.BytesIO()
    if image.size != order.size:
        image = image.resize(order.size, Image.Resampling.BICUBIC)
    if order.format == "png":
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
    return base64.b64encode(buffer.getvalue()).decode()
