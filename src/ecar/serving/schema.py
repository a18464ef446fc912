"""Bodies of requests and answers: the OpenAI Images API and a few extensions. Strict types, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ecar.refine.best_of import MOST_CANDIDATES
from ecar.sampling.noise import MAX_SEED
from ecar.sampling.solvers import SOLVERS, get_solver
from ecar.serving.config import MAX_IMAGES


def _whole(value: Any) -> Any:
    """2.0 is the integer 2, in JSON and in its schema; clients without integers send it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _solver(name: str) -> str:
    get_solver(name)
    return name


Whole = BeforeValidator(_whole)
Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=10_000), Whole]
PerStage = Field(min_length=1, max_length=16)


class GenerateRequest(BaseModel):
    """``POST /v1/images/generations``."""

    model_config = ConfigDict(strict=True, extra="forbid", title="CreateImageRequest")

    prompt: str = Field(min_length=1, max_length=32_000, description="Class name, synonym or id.")
    model: str | None = Field(None, max_length=256, description="The served model; may be left out.")
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES), Whole] | None = Field(
        None, description="Images; image i has seed + i. Default 1."
    )
    size: str | None = Field(None, max_length=32, description="auto or the model's size, as WIDTHxHEIGHT.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="Solver steps: half the model's default, once (auto, standard), 2, 3 and 4 times."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="Default png.")
    output_compression: Annotated[int, Field(ge=0, le=100), Whole] | None = Field(
        None, description="Quality of jpeg and webp. Default 100."
    )
    background: Literal["auto", "opaque", "transparent"] | None = None
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url is refused.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3), Whole] | None = Field(
        None, description="Previews of each image, with stream only."
    )
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED), Whole] | None = Field(
        None, description="Extension. -1 and default: random."
    )
    guidance_scale: Scale | Annotated[list[Scale], PerStage] | None = Field(
        None, description="Extension: one number for every stage, or one per stage; 1 turns guidance off."
    )
    num_inference_steps: Steps | Annotated[list[Steps], PerStage] | None = Field(
        None, description="Extension: solver steps of every stage, or one number per stage. Overrides quality."
    )
    solver: Annotated[str, AfterValidator(_solver)] | None = Field(
        None, description="Extension.", json_schema_extra={"enum": [*SOLVERS, None]}
    )
    candidates: Annotated[int, Field(ge=1, le=MOST_CANDIDATES), Whole] | None = Field(
        None, description="Extension: samples per image, of which a critic shows one."
    )
    negative_prompt: str | None = Field(None, max_length=32_000, description="Refused unless empty.")
    user: str | None = Field(None, max_length=1024, description="Ignored, as are the next three.")
    safety_identifier: str | None = Field(None, max_length=1024)
    moderation: str | None = Field(None, max_length=32)
    style: str | None = Field(None, max_length=32)
    svg: Any | None = Field(None, description="Refused unless null, as is the next.")
    complexity: Any | None = None


class VariationRequest(GenerateRequest):
    """Fields of the form of ``POST /v1/images/variations``, beside the file ``image``. Numbers come as text."""

    model_config = ConfigDict(strict=False, title="CreateImageVariationRequest")

    prompt: str | None = Field(  # type: ignore[assignment]
        None, min_length=1, max_length=32_000, description="Extension. Class name, synonym or id; default: none."
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Extension: how much is drawn anew. Default 1 with a mask, 0.5 without."
    )


class EditRequest(VariationRequest):
    """Fields of the form of ``POST /v1/images/edits``, beside the files ``image`` and ``mask``."""

    model_config = ConfigDict(title="CreateImageEditRequest")

    prompt: str = Field(min_length=1, max_length=32_000, description="Class name, synonym or id.")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="Ignored: what is kept stays as it is.")


class ImageData(BaseModel):
    """One image."""

    b64_json: str
    seed: int
    chosen_seed: int | None = Field(None, description="Of the candidate that is shown, where it is not the first.")


class TokenDetails(BaseModel):
    """Of the input."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """``output_tokens`` are latent tokens of all stages and images."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class ImagesAnswer(BaseModel):
    """The answer to a request without ``stream``."""

    created: int
    data: list[ImageData]
    output_format: str
    size: str
    quality: str
    background: str
    usage: Usage


class StageInfo(BaseModel):
    """A stage of the model: side of its map, share of data at its end, default steps and guidance."""

    side: tuple[int, int]
    end: float
    steps: int
    guidance: float


class ModelInfo(BaseModel):
    """A model, as the OpenAI API lists it, with what a page needs to know."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    size: str
    stages: list[StageInfo]
    solver: str
    num_classes: int
    max_images: int
    max_steps: int
    max_candidates: int
    """1: it has no critic, or not what the critic needs."""
    fixed_steps: bool
    """It was distilled for these steps, and draws worse in any others."""


class ModelList(BaseModel):
    """All models; here one."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ClassInfo(BaseModel):
    """A class that a prompt may name."""

    id: int
    name: str


class ClassList(BaseModel):
    """All classes of a model, by id."""

    object: Literal["list"] = "list"
    data: list[ClassInfo]


class Status(BaseModel):
    """Of the server."""

    status: str


class ErrorDetail(BaseModel):
    """What is wrong, of which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's envelope."""

    error: ErrorDetail
