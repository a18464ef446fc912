"""Events of a job -> one JSON answer, or a stream of server-sent events. Images -> the formats that the API knows."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.types import Receive, Scope, Send

from ecar.sampling.pictures import save_png
from ecar.serving.errors import ApiError
from ecar.serving.job import Job
from ecar.serving.order import Order
from ecar.serving.rows import Finished, Preview
from ecar.serving.schema import ImageData, ImagesAnswer
from ecar.serving.threads import ENCODING

PING_SECONDS = 10.0
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
log = logging.getLogger("ecar.serving")


class EventResponse(StreamingResponse):
    """``event_stream`` as an answer. The job ends with it, also where the client left before the first byte: then the
    generator is never started, and its own ``finally`` never runs."""

    def __init__(self, job: Job) -> None:
        super().__init__(event_stream(job), media_type="text/event-stream", headers=_HEADERS)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def whole_answer(job: Job, request: Request) -> bytes:
    """All images in one answer, as JSON. A client that goes away cancels the job.

    Raises:
        ApiError: an image failed, or the client went away (499, which nobody reads).
    """

    def write(images: list[Finished]) -> bytes:
        """Encoding, base64 and JSON: tens of milliseconds, in a thread."""
        data, order = [], job.order
        for finished, seed in zip(images, order.seeds, strict=True):
            chosen = None if finished.seed == seed else finished.seed
            text = _encode(finished.image, order, finished.seed)
            data.append(ImageData(b64_json=text, seed=seed, chosen_seed=chosen))
        answer = ImagesAnswer(
            created=int(time.time()), data=data, output_format=order.format, size=order.size_text,
            quality=order.quality, background="opaque", usage=order.usage,
        )  # fmt: skip
        return answer.model_dump_json(exclude_none=True).encode()

    collect, gone = asyncio.create_task(_collect(job)), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({collect, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not collect.done():
            raise ApiError(499, "client_closed_request", "the client went away")
        images = await collect
    finally:
        job.cancel()
        collect.cancel()
        gone.cancel()
    return await ENCODING.run(write, images)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(job: Job) -> list[Finished]:
    images: dict[int, Finished] = {}
    async for found in job.events():
        if found is not None and isinstance(found[1], Finished):
            images[found[0]] = found[1]
    return [images[i] for i in range(len(job.order.seeds))]


async def event_stream(job: Job) -> AsyncIterator[str]:
    """Server-sent events: each preview, each finished image, or one error at the end. A stream that merely stops would
    look like success. No ``id:`` or ``retry:`` fields: the official client cannot read them."""
    order = job.order
    common = {
        "size": order.size_text, "quality": order.quality, "background": "opaque", "output_format": order.format,
        "num_stages": order.stages,
    }  # fmt: skip
    usage = order.image_usage.model_dump()
    try:
        async for found in job.events(PING_SECONDS):
            if found is None:
                yield ": ping\n\n"
                continue
            index, event = found
            seed = order.seeds[index]
            body = {"created_at": int(time.time()), "image_index": index, "seed": seed, **common}
            if isinstance(event, Preview):
                body.update(partial_image_index=event.number, stage=event.stage)
                yield await ENCODING.run(_event, f"{order.kind}.partial_image", body, event.image, order)
            else:
                body.update(stage=order.stages, usage=usage)
                if event.seed != seed:
                    body.update(chosen_seed=event.seed)
                yield await ENCODING.run(_event, f"{order.kind}.completed", body, event.image, order, event.seed)
    except ApiError as error:
        yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
    except Exception as error:
        log.exception("inside a stream")
        yield f"event: error\ndata: {json.dumps(ApiError.bug(error).body())}\n\n"
    finally:
        job.cancel()


def _event(kind: str, body: dict[str, Any], image: Image.Image, order: Order, seed: int | None = None) -> str:
    body = {"type": kind, "b64_json": _encode(image, order, seed), **body}
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n"


def _encode(image: Image.Image, order: Order, seed: int | None) -> str:
    """An image in the format and size of the order, in base64.

    Args:
        image: a preview, which may be smaller, or the final image.
        seed: goes into the metadata of a png, with class and settings: the image can be made again.
    """
    buffer = io.BytesIO()
    if image.size != order.size:
        image = image.resize(order.size, Image.Resampling.BICUBIC)
    if order.format == "png":
        record: dict[str, Any] = {"class": order.class_name, "seed": seed, "settings": order.settings.to_json()}
        if order.redraw is not None:
            record["strength"] = order.redraw.strength
        save_png(image, buffer, {} if seed is None else {"ecar": json.dumps(record)})
    elif order.format == "jpeg":
        image.save(buffer, "JPEG", quality=max(1, order.compression))
    else:
        image.save(buffer, "WEBP", quality=order.compression)
    return base64.b64encode(buffer.getvalue()).decode()
