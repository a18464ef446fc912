"""A checked request: what exactly is to be computed. Everything wrong is found here, before the engine hears of it."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from ecar.config import SamplingConfig
from ecar.sampling.classes import AmbiguousClass, UnknownClass
from ecar.sampling.noise import MAX_SEED
from ecar.sampling.pipeline import Pipeline
from ecar.serving.config import Limits
from ecar.serving.errors import ApiError
from ecar.serving.previews import Point, preview_points
from ecar.serving.rows import Redraw
from ecar.serving.schema import GenerateRequest, TokenDetails, Usage

# Times the model's steps, where it was not distilled for them.
QUALITIES = {"low": 0.5, "medium": 1.0, "high": 2.0, "xhigh": 3.0, "max": 4.0}
_SYNONYMS = {"auto": "medium", "standard": "medium", "hd": "high"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a request asks for, in the engine's terms.

    Attributes:
        label: class id.
        seeds: one per image.
        candidates: samples drawn for each, of which the critic chooses one.
        points: where previews are decoded.
        size: (width, height) in pixels.
        compression: quality of jpeg and webp, 0..100.
        redraw: the picture that is edited.
    """

    label: int
    class_name: str
    seeds: tuple[int, ...]
    candidates: int
    settings: SamplingConfig
    points: tuple[Point, ...]
    stages: int
    size: tuple[int, int]
    quality: str
    format: str
    compression: int
    usage: Usage
    redraw: Redraw | None = None

    @property
    def kind(self) -> str:
        """As the API names it in events."""
        return "image_generation" if self.redraw is None else "image_edit"

    @property
    def image_usage(self) -> Usage:
        """Of each image, for events: added up, they are that of the request (but each image reads the prompt)."""
        tokens = self.usage.output_tokens // len(self.seeds)
        return self.usage.model_copy(update={"output_tokens": tokens, "total_tokens": self.usage.input_tokens + tokens})

    @property
    def size_text(self) -> str:
        """As the API writes it."""
        return f"{self.size[0]}x{self.size[1]}"


def make_order(request: GenerateRequest, pipe: Pipeline, limits: Limits, *, chooses: bool = False) -> Order:
    """Check a request against the model and the limits.

    Args:
        chooses: whether there is a critic to choose among candidates.

    Raises:
        ApiError: 400, naming the parameter.
    """
    config, n = pipe.model.config, request.n or 1
    label = _class_id(request.prompt, pipe)
    size = (config.image_side[1], config.image_side[0])
    if request.size not in (None, "auto", f"{size[0]}x{size[1]}"):
        raise ApiError(400, "unsupported_size", f"size must be auto or {size[0]}x{size[1]}", "size")
    _refuse_unsupported(request)
    asked = request.quality or "auto"
    quality = _SYNONYMS.get(asked, asked)
    settings = _settings(request, pipe, QUALITIES[quality], limits)
    seed = secrets.randbelow(MAX_SEED - n) if request.seed in (None, -1) else request.seed
    if seed + n - 1 > MAX_SEED:
        raise ApiError(400, "invalid_value", f"seed + n - 1 must not exceed {MAX_SEED}", "seed")
    candidates = _candidates(request, limits, chooses=chooses)
    image_tokens = n * candidates * sum(stage.tokens for stage in pipe.model.plan)
    details = TokenDetails(text_tokens=1, image_tokens=0)
    return Order(
        label=label,
        class_name=config.class_names[label] if label < len(config.class_names) else "",
        seeds=tuple(range(seed, seed + n)),
        candidates=candidates,
        settings=settings,
        points=preview_points(settings.steps, request.partial_images or 0),
        stages=len(pipe.model.plan),
        size=size,
        quality=quality,
        format=request.output_format or "png",
        compression=100 if request.output_compression is None else request.output_compression,
        usage=Usage(
            input_tokens=1, output_tokens=image_tokens, total_tokens=1 + image_tokens, input_tokens_details=details
        ),
    )


def _class_id(prompt: str | None, pipe: Pipeline) -> int:
    if prompt is None or pipe.model.config.num_classes == 0:
        return pipe.model.config.null_class  # trained without labels: a prompt is required by the API and says nothing
    try:
        known = prompt in pipe.model.config.class_names  # of whatever length; messages repeat what is not, shortened
        return pipe.class_id(prompt if known or len(prompt) <= 200 else prompt[:200] + "...")
    except AmbiguousClass as error:
        raise ApiError(400, "ambiguous_class", str(error), "prompt") from None
    except UnknownClass as error:
        raise ApiError(400, "unknown_class", str(error), "prompt") from None


def _refuse_unsupported(request: GenerateRequest) -> None:
    """Values that the API knows and this server does not."""
    if request.background == "transparent":
        raise ApiError(400, "unsupported_value", "the model has no transparency; use opaque or auto", "background")
    if request.response_format == "url":
        raise ApiError(400, "unsupported_value", "no images are kept here: b64_json is given", "response_format")
    if request.negative_prompt:
        raise ApiError(400, "unsupported_value", "the model knows no negative prompt", "negative_prompt")
    for name in ("svg", "complexity"):
        if getattr(request, name) is not None:
            raise ApiError(400, "unsupported_value", f"{name} is not supported", name)
    if request.partial_images and not request.stream:
        raise ApiError(400, "invalid_value", "partial_images needs stream: true", "partial_images")


def _settings(request: GenerateRequest, pipe: Pipeline, factor: float, limits: Limits) -> SamplingConfig:
    steps = request.num_inference_steps
    try:
        if steps is None:
            own = pipe.settings()
            steps = [s if own.fixed_steps else math.ceil(factor * s) for s in own.steps]
        settings = pipe.settings(steps=steps)
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), "num_inference_steps") from None
    if sum(settings.steps) > limits.max_steps:
        message = f"{sum(settings.steps)} steps in all stages together; this server allows {limits.max_steps}"
        param = "quality" if request.num_inference_steps is None else "num_inference_steps"
        raise ApiError(400, "too_many_steps", message, param)
    try:
        return pipe.settings(steps=settings.steps, guidance=request.guidance_scale, solver=request.solver)
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), "guidance_scale") from None


def most_candidates(limits: Limits, *, chooses: bool) -> int:
    """What a request may ask for: 1 where the model has no critic that can be used."""
    return min(limits.max_candidates, limits.max_queue) if chooses else 1


def _candidates(request: GenerateRequest, limits: Limits, *, chooses: bool) -> int:
    candidates, n = request.candidates or 1, request.n or 1
    if candidates == 1:
        return 1
    if not chooses:
        raise ApiError(400, "unsupported_value", "this model has no critic to choose among candidates", "candidates")
    if candidates > (most := most_candidates(limits, chooses=chooses)):
        raise ApiError(400, "too_many_candidates", f"{candidates} candidates; this server allows {most}", "candidates")
    if n * candidates > limits.max_queue:
        message = f"{n} images of {candidates} candidates are more than the {limits.max_queue} samples of the queue"
        raise ApiError(400, "too_many_candidates", message, "candidates")
    if request.partial_images:
        message = "which candidate is shown is known at its end only: previews need candidates 1"
        raise ApiError(400, "invalid_value", message, "candidates")
    return candidates
