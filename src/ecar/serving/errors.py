"""Every answer that is not 2xx has OpenAI's envelope: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ecar.serving.rows import EngineError

_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter", "json_invalid": "bad_json"}


class ApiError(Exception):
    """An answer other than 2xx."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    @classmethod
    def of(cls, error: EngineError) -> ApiError:
        """An engine's error. Clients repeat 5xx by themselves: where that cannot help they are told not to."""
        if error.retry_after is None:
            return cls(error.status, error.code, str(error), headers={"x-should-retry": "false"})
        return cls(error.status, error.code, str(error), headers={"retry-after": str(error.retry_after)})

    @classmethod
    def bug(cls, error: Exception) -> ApiError:
        """Of something that nobody expected; what it says stays in the log."""
        return cls(500, "internal_error", f"an error inside the server ({type(error).__name__})")

    def body(self) -> dict[str, Any]:
        """The envelope."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _printable(self.param)
        return {"error": {"message": _printable(str(self)), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def _printable(text: str) -> str:
    """Bounded, and without lone surrogates, which JSON may carry and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()[:1000]


def install(app: FastAPI) -> None:
    """Handlers for everything that can be raised: FastAPI's own answers have other shapes."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        """What the schema refuses, as the API's own 400: of several faults the first."""
        first, *others = error.errors()
        same = [fault for fault in others if fault["loc"][:2] == first["loc"][:2]]
        if isinstance(first.get("input"), list) and same:
            first = same[0]  # one number or a list: of a list, what is wrong with the list
        place = [str(part) for part in first["loc"][1:]] if first["type"] != "json_invalid" else []
        code = _CODES.get(first["type"], "invalid_value")
        param = place[0] if place else None
        message = f"{param}: {first['msg']}" if param else f"the body is not as expected: {first['msg']}"
        if param is None and "json" not in request.headers.get("content-type", ""):
            message = "the body is not read as JSON: send it with Content-Type: application/json"
        if code == "unknown_parameter":
            message = f"unknown parameter {param!r}"
        return ApiError(400, code, message, param).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        """What the routes refuse: no such path or method, a body that is no JSON. OPTIONS is answered as well."""
        code = {404: "not_found", 405: "method_not_allowed", 400: "bad_json"}.get(error.status_code, "error")
        message, headers = str(error.detail) or HTTPStatus(error.status_code).phrase, dict(error.headers or {})
        if error.status_code == 400:  # FastAPI's own words name no cause
            message = (
                "the body is no JSON in UTF-8 that can be read: compressed, nested too deeply, or a number too long"
            )
        if error.status_code == 405:
            allowed = {method.strip() for method in headers.pop("Allow", "GET").split(",")} | {"OPTIONS"}
            headers["allow"] = ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        return ApiError(error.status_code, code, message, headers=headers).response()
