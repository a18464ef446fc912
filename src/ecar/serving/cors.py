"""CORS: pages of which other sites may use the API. The outermost layer: errors and streams carry its headers too, and
a preflight request needs no key."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ecar.serving.errors import ApiError

METHODS = ("GET", "HEAD", "POST")


class Cors(CORSMiddleware):
    """Starlette's, with refusals in the API's envelope.

    Args:
        origins: as browsers send them, or "*"; none: pages of this server only.
    """

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        # Keys travel in a header and not in cookies: no credentials in the sense of CORS. Clients add headers of
        # their own (x-stainless-...), so any may be sent.
        super().__init__(
            app, allow_origins=origins, allow_methods=METHODS, allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after", "x-should-retry"),
        )  # fmt: skip

    def preflight_response(self, request_headers: Headers) -> Response:
        """200 with what is allowed, or 403 in words."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        origin = request_headers["origin"][:200]
        if self.is_allowed_origin(request_headers["origin"]):
            message = f"pages of other sites may send {', '.join(METHODS)}"
        else:
            message = f"pages of {origin} may not use this server; its --cors-origin names those that may"
        headers = {"vary": answer.headers["vary"]}
        return ApiError(403, "cors_refused", message, headers=headers).response()


def check_origin(request: Request, *, origins: Collection[str]) -> None:
    """Refuse a form of another site's page: a browser sends it without a preflight request.

    Raises:
        ApiError: 403, the page is neither this server's nor one of ``origins``.
    """
    origin = request.headers.get("origin")
    if origin is None or origin in origins or "*" in origins or request.headers.get("sec-fetch-site") == "same-origin":
        return
    if urlsplit(origin).netloc != request.headers.get("host"):
        message = f"pages of {origin[:200]} may not use this server; its --cors-origin names those that may"
        raise ApiError(403, "cors_refused", message)
