"""The routes: OpenAI's Images API and models, health and metrics, and the page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from ecar import __version__
from ecar.serving import errors, schema
from ecar.serving.answers import EventResponse, whole_answer
from ecar.serving.config import MAX_IMAGES
from ecar.serving.edits import form_schema, read_edit
from ecar.serving.engine import Engine
from ecar.serving.errors import ApiError
from ecar.serving.job import Job
from ecar.serving.middleware import Front
from ecar.serving.order import make_order, most_candidates
from ecar.serving.threads import Threads

MOST_PICTURES = 16  # uploads that wait to be decoded, in memory; more are answered 429
MOST_CHECKS = 64  # requests that wait for their prompt to be looked up; more are answered 429
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
STATIC = Path(__file__).parent / "static"


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorAnswer} for status in statuses}


def create_app(
    engine: Engine,
    name: str,
    *,
    keys: Collection[str] = (),
    request_ids: bool = True,
    cors_origins: Collection[str] = (),
) -> FastAPI:
    """The server as an ASGI app; it starts the engine when it starts and stops it when it ends.

    Args:
        engine: started or not.
        name: the model's name in the API.
        keys: API keys; none: no key is asked for.
        request_ids: answers carry ``x-request-id``.
        cors_origins: of pages that may use the server, as of ``check_origins``.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    # FastAPI's own documentation pages load scripts from elsewhere: they are off.
    app = FastAPI(
        title="ecar", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses=_refusals(400, 401, 404, 405, 408, 413, 415, 500),
    )  # fmt: skip
    app.add_middleware(Front, limits=engine.limits, metrics=engine.metrics, keys=tuple(keys), request_ids=request_ids)
    # The outermost layer: errors and streams carry its headers too, and a preflight request needs no key. Keys travel
    # in a header and not in cookies: no credentials in the sense of CORS. Clients send headers of their own.
    app.add_middleware(
        CORSMiddleware, allow_origins=cors_origins, allow_methods=("GET", "HEAD", "POST"), allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "x-should-retry"),
    )  # fmt: skip
    errors.install(app)
    _add_images(app, engine, name)
    _add_edits(app, engine, name, cors_origins)
    _add_models(app, engine, name)
    _add_status(app, engine)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    return app


def _check_model(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise ApiError(404, "model_not_found", f"no model {asked!r} here; this server has {name!r}", "model")


def _check_page(request: Request, origins: Collection[str]) -> None:
    """403 for a form of a page that is neither this server's nor one of ``origins``: a browser sends it without a
    preflight request."""
    origin = request.headers.get("origin")
    if origin is None or origin in origins or "*" in origins or request.headers.get("sec-fetch-site") == "same-origin":
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        message = f"pages of {origin[:200]} may not use this server; its --cors-origin names those that may"
        raise ApiError(403, "cors_refused", message)


async def _answered(body: schema.GenerateRequest, job: Job, request: Request) -> Response:
    if body.stream:
        return EventResponse(job)
    answer = await whole_answer(job, request)
    return Response(answer, media_type="application/json")  # checked already: not once more


def _add_images(app: FastAPI, engine: Engine, name: str) -> None:
    # One thread: what it does is Python, and a second one would only take more time from the event loop.
    checks = Threads("ecar-checks", 1, MOST_CHECKS)

    @app.post(
        "/v1/images/generations",
        response_model=schema.ImagesAnswer,
        responses={200: {"content": STREAM}, **_refusals(429, 503, 504)},
    )
    async def generate(body: schema.GenerateRequest, request: Request) -> Any:
        """Make images of a class. With ``stream``: server-sent events, previews as they appear, then each image."""
        _check_model(body.model, name)
        make = partial(make_order, body, engine.pipe, engine.limits, chooses=engine.critic is not None)
        known = body.prompt in engine.pipe.model.config.class_names
        job = Job(engine, make() if known else await checks.run(make))  # near names are looked for among all
        return await _answered(body, job, request)


def _add_edits(app: FastAPI, engine: Engine, name: str, origins: Collection[str]) -> None:
    # One thread: a large picture takes hundreds of megabytes while it is decoded.
    pictures = Threads("ecar-pictures", 1, MOST_PICTURES)

    async def edited(request: Request, kind: type[schema.VariationRequest]) -> Response:
        """The answer to a form: its pictures are decoded in the thread, what is drawn joins the engine's queue."""
        _check_page(request, origins)
        body = b"".join([part async for part in request.stream()])
        chooses = engine.critic is not None
        fields, order = await pictures.run(
            read_edit, request.headers.get("content-type", ""), body, kind, engine.pipe, engine.limits, chooses=chooses
        )
        _check_model(fields.model, name)
        return await _answered(fields, Job(engine, order), request)

    answers: dict[str, Any] = {
        "response_model": schema.ImagesAnswer,
        "responses": {200: {"content": STREAM}, **_refusals(403, 429, 503, 504)},
    }

    @app.post("/v1/images/edits", openapi_extra=form_schema(schema.EditRequest, mask=True), **answers)
    async def edit(request: Request) -> Any:
        """Draw a part of a picture anew: where the mask is transparent. Without a mask, all of it in part."""
        return await edited(request, schema.EditRequest)

    @app.post("/v1/images/variations", openapi_extra=form_schema(schema.VariationRequest, mask=False), **answers)
    async def vary(request: Request) -> Any:
        """Draw a picture anew in part."""
        return await edited(request, schema.VariationRequest)


def _add_models(app: FastAPI, engine: Engine, name: str) -> None:
    created = int(time.time())

    def info() -> schema.ModelInfo:
        """The model as the API describes it: settings are read when asked, since they follow the pipeline's."""
        config, settings = engine.pipe.model.config, engine.pipe.settings()
        stages = [
            schema.StageInfo(side=stage.side, end=stage.end, steps=steps, guidance=guidance)
            for stage, steps, guidance in zip(engine.pipe.model.plan, settings.steps, settings.guidance, strict=True)
        ]
        return schema.ModelInfo(
            id=name, created=created, owned_by="ecar", size=f"{config.image_side[1]}x{config.image_side[0]}",
            stages=stages, solver=settings.solver, num_classes=config.num_classes,
            max_images=MAX_IMAGES, max_steps=engine.limits.max_steps,
            max_candidates=most_candidates(engine.limits, chooses=engine.critic is not None),
            fixed_steps=settings.fixed_steps,
        )  # fmt: skip

    @app.get("/v1/models")
    async def models() -> schema.ModelList:
        """All models; here one."""
        return schema.ModelList(data=[info()])

    @cache
    def listed() -> bytes:
        """Ten thousand classes take 15 ms: once."""
        config = engine.pipe.model.config
        names = config.class_names or tuple(map(str, range(config.num_classes)))
        found = schema.ClassList(data=[schema.ClassInfo(id=i, name=text) for i, text in enumerate(names)])
        return found.model_dump_json().encode()

    @app.get("/v1/models/{model:path}/classes", response_model=schema.ClassList)
    async def classes(model: str) -> Response:
        """What a prompt may name."""
        _check_model(model, name)
        return Response(listed(), media_type="application/json")

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> schema.ModelInfo:
        """One model."""
        _check_model(model, name)
        return info()


def _add_status(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", responses=_refusals(503))
    async def health() -> schema.Status:
        """Whether the process is of use: 503 only where a restart of the process is needed."""
        if engine.state == "failed":
            raise ApiError(503, "engine_failed", "the engine failed too often; restart the server")
        return schema.Status(status="ok")

    @app.get("/ready", responses=_refusals(503))
    async def ready() -> schema.Status:
        """Whether requests are accepted: 503 before the model is warm, while it is loaded again, and while draining."""
        if engine.state != "ready":
            raise ApiError(503, "not_ready", f"the server is {engine.state}")
        return schema.Status(status="ready")

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Prometheus."""
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)
