"""A form with pictures, as an edit comes -> an ``Order``. Runs in a thread of its own, without torch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from ecar.files.images import BadImageError, decode_image, load_image
from ecar.sampling.canvas import Canvas
from ecar.sampling.edit import begin_maps, redrawn
from ecar.sampling.pipeline import Pipeline
from ecar.serving.config import Limits
from ecar.serving.errors import ApiError
from ecar.serving.order import Order, make_order
from ecar.serving.previews import drawn_points
from ecar.serving.rows import Redraw
from ecar.serving.schema import EditRequest, TokenDetails, VariationRequest

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow knows others, some of which start programs
MAX_PIXELS = 50_000_000  # of an upload: half a second and some hundred megabytes
MOST_PARTS = 64
Parts = dict[str, list[str | bytes]]  # by name: texts, and files as bytes


def form_schema(kind: type[VariationRequest], *, mask: bool) -> dict[str, Any]:
    """The body of a route, as OpenAPI describes it."""
    files = {"image": {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP or GIF."}}
    if mask:
        text = "Of the same size: its transparent pixels are drawn or, where it has none, its white ones."
        files["mask"] = {"type": "string", "format": "binary", "description": text}
    fields = kind.model_json_schema()
    fields["properties"] = files | fields["properties"]
    fields["required"] = ["image", *fields.get("required", ())]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": fields}}}}


def read_edit(
    content_type: str, body: bytes, kind: type[VariationRequest], pipe: Pipeline, limits: Limits, *, chooses: bool
) -> tuple[VariationRequest, Order]:
    """Check a form against the model and the limits.

    Args:
        content_type: with the boundary.
        body: the form.
        kind: of the request, with its fields.
        pipe: of the engine; not computed with.
        limits: of the server.
        chooses: whether there is a critic to choose among candidates.

    Raises:
        ApiError: 400 or 415, naming the parameter.
        RequestValidationError: of its fields.
    """
    parts = read_form(content_type, body)
    image = _file(parts, "image", "this API edits one picture at a time")
    if image is None:
        raise ApiError(400, "missing_required_parameter", "give a picture: a file named image", "image")
    mask = _file(parts, "mask", "give one") if issubclass(kind, EditRequest) else None
    fields = _fields(parts, kind)
    order = make_order(fields, pipe, limits, chooses=chooses)
    if order.candidates > 1 and fields.prompt is None:
        raise ApiError(400, "invalid_value", "candidates need a prompt: the critic judges by its class", "candidates")
    strength = fields.strength or (0.5 if mask is None else 1.0)
    redraw, plan = Redraw(_canvas(image, mask, strength, pipe), strength), pipe.model.plan
    tokens = plan[-1].tokens  # of the picture
    usage = order.usage.model_copy(
        update={
            "input_tokens": 1 + tokens,
            "total_tokens": order.usage.total_tokens + tokens,
            "input_tokens_details": TokenDetails(text_tokens=1, image_tokens=tokens),
        }
    )
    first = [float(times.min()) for times in begin_maps(plan, redraw.canvas.drawn, strength)]
    points = drawn_points(order.settings.steps, first, fields.partial_images or 0)
    return fields, replace(order, redraw=redraw, points=points, usage=usage)


def read_form(content_type: str, body: bytes) -> Parts:
    """Parts of a multipart body; files stay in memory.

    Raises:
        ApiError: another type, not what it says, cut off, or more than ``MOST_PARTS`` parts.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(415, "unsupported_media_type", "send a form: Content-Type: multipart/form-data, with a boundary")
    parts, ended = defaultdict[str, list[str | bytes]](list), list[bool]()

    def keep(part: Field | File) -> None:
        """A part that is complete: its text, or its file's bytes."""
        name = (part.field_name or b"").decode()
        if isinstance(part, File):
            part.file_object.seek(0)
            parts[name].append(part.file_object.read())
        else:
            parts[name].append((part.value or b"").decode())
        if sum(map(len, parts.values())) > MOST_PARTS:
            raise FormParserError(f"more than {MOST_PARTS} parts")

    try:
        parser = FormParser(
            "multipart/form-data", keep, keep, lambda: ended.append(True), options[b"boundary"],
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # never on disk
        )  # fmt: skip
        parser.write(body)
        parser.finalize()
    except ValueError as error:  # the parser's, and of text that is no UTF-8
        raise ApiError(400, "bad_form", f"the form cannot be read: {error}") from None
    if not ended:
        raise ApiError(400, "bad_form", "the form is cut off: its last boundary is missing")
    return parts


def _file(parts: Parts, name: str, several: str) -> bytes | None:
    """Take a file out of the parts. Clients write lists as ``name[]``."""
    found = parts.pop(name, []) + parts.pop(f"{name}[]", [])
    if len(found) > 1:
        raise ApiError(400, "invalid_value", f"{len(found)} files named {name}: {several}", name)
    if found and isinstance(found[0], str):
        raise ApiError(400, "invalid_value", f"{name} has to be sent as a file, with a file name", name)
    return found[0] if found and isinstance(found[0], bytes) else None


def _fields(parts: Parts, kind: type[VariationRequest]) -> VariationRequest:
    """The other parts, as the schema has them."""
    values: dict[str, Any] = {}
    for name, found in parts.items():
        plain = name.removesuffix("[]")
        if plain in values or (plain == name and len(found) > 1):
            raise ApiError(400, "invalid_value", f"{plain} is given more than once", plain)
        if any(isinstance(value, bytes) for value in found):
            code = "invalid_value" if plain in kind.model_fields else "unknown_parameter"
            raise ApiError(400, code, f"{plain!r} is no file of this request", plain)
        values[plain] = found[0] if plain == name else found
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


def _canvas(image: bytes, mask: bytes | None, strength: float, pipe: Pipeline) -> Canvas:
    try:
        picture = decode_image(image, most=MAX_PIXELS, formats=FORMATS)
    except BadImageError as error:
        raise _unusable(error, "image") from None
    try:
        opened = None if mask is None else load_image(mask, most=MAX_PIXELS, formats=FORMATS)
    except BadImageError as error:
        raise _unusable(error, "mask") from None
    try:
        return redrawn(picture, pipe.model.config.image_side, opened, strength)
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), "strength" if mask is None else "mask") from None


def _unusable(error: BadImageError, param: str) -> ApiError:
    text = str(error)
    if "UnidentifiedImageError" in text:
        text = f"is not a picture: of what format a file is, its content says and not its name ({', '.join(FORMATS)})"
    return ApiError(400, "invalid_image", f"{param} {text}", param)
