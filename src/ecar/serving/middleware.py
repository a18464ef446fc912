"""Around the app: size and time of bodies, keys, headers, one log line per request. Plain ASGI, so that streams stay
streams."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ecar.serving.config import Limits
from ecar.serving.errors import ApiError
from ecar.serving.metrics import Metrics

log = logging.getLogger("ecar.serving")
CROWDED = "ecar.crowded"  # in a scope: its connection is one too many
PROBES = ("/health", "/ready", "/metrics")
UPLOADS = ("/v1/images/edits", "/v1/images/variations")
MOST_UPLOADS = 32  # bodies of edits that are read at once: each may take ``max_upload`` bytes of memory
LINGER_SECONDS, LINGER_BYTES = 2.0, 2**24
MOST_VALUES = 4096  # commas and brackets of a JSON body: a MiB of empty lists keeps the event loop busy for 0.3 s
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def _route(scope: Scope) -> str:
    """The path that the app routes by: under a prefix (Ray's ``--route-prefix``, a mount) ``path`` has that too."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if path.startswith(f"{root}/") else path


class Front:
    """Refuses what is too large, too slow or without a key; adds headers; logs method, route, status and time (of
    probes only at level DEBUG).

    Nothing that a client sends is logged but the method and the path, escaped.

    Args:
        keys: accepted API keys for paths under /v1; none: everybody is served.
        request_ids: whether answers carry ``x-request-id`` (a proxy in front may set its own).
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, keys: Collection[str], request_ids: bool
    ) -> None:
        self.app, self.limits, self.metrics, self.request_ids = app, limits, metrics, request_ids
        self._uploading = 0
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, name = time.monotonic(), f"req_{secrets.token_hex(8)}"
        status = 499  # as it stays where the client went away
        headless = scope["method"] == "HEAD"  # answered as GET is, without the body

        async def send_with_headers(message: Message) -> None:
            """Send with our headers, and to HEAD no body."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = {**HEADERS, "x-request-id": name} if self.request_ids else HEADERS
                pairs = [(key.encode(), value.encode()) for key, value in extra.items()]
                message = {**message, "headers": [*message["headers"], *pairs]}
            elif headless and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check_crowd(scope)
            self._check_key(scope)
            again = await self._received(scope, receive)
            if again is not None:
                inner = {**scope, "method": "GET"} if headless else scope
                await self.app(inner, again, send_with_headers)
        except ApiError as error:
            if error.status == 413 and b"expect" not in dict(scope["headers"]):
                await _linger(receive)
            await error.response()(scope, receive, send_with_headers)
        except Exception as error:
            log.exception("answering %s", name)
            if status != 499:
                raise  # an answer has begun: the connection is closed, so that it does not look complete
            await ApiError.bug(error).response()(scope, receive, send_with_headers)
        finally:
            self.metrics.responses.labels(str(status)).inc()
            took = (time.monotonic() - start) * 1000
            level = logging.DEBUG if _route(scope) in PROBES else logging.INFO  # asked every second, for ever
            log.log(level, "%s %r %d %.0f ms %s", scope["method"], scope["path"][:200], status, took, name)

    def _check_crowd(self, scope: Scope) -> None:
        if CROWDED in scope and _route(scope) not in PROBES:
            message = f"more than {self.limits.max_connections} connections are open"
            headers = {"retry-after": "1", "connection": "close"}
            raise ApiError(503, "too_many_connections", message, headers=headers)

    def _check_key(self, scope: Scope) -> None:
        path = _route(scope)
        if not self._keys or not path.startswith("/v1/") or scope["method"] == "OPTIONS":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, in constant time: how long it takes says nothing.
        fits = [hmac.compare_digest(digest, known) for known in self._keys]
        if kind.lower() != b"bearer" or not any(fits):
            message = "give a valid key: Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})

    async def _received(self, scope: Scope, receive: Receive) -> Receive | None:
        """What the app reads, once the whole body is here and checked; None where the client went away."""
        upload = _route(scope) in UPLOADS
        if upload and self._uploading >= MOST_UPLOADS:
            message, headers = f"{MOST_UPLOADS} uploads are being read", {"retry-after": "1", "connection": "close"}
            raise ApiError(429, "queue_full", message, headers=headers)
        self._uploading += upload
        try:
            body = await self._read(scope, receive, self.limits.max_upload if upload else self.limits.max_body)
        finally:
            self._uploading -= upload
        if body is None:
            return None
        _check_body(scope, body)
        return _replay(body, receive)

    async def _read(self, scope: Scope, receive: Receive, limit: int) -> bytes | None:
        """The whole body, within its bounds; None where the client went away."""
        too_large = ApiError(413, "body_too_large", f"a body may have {limit} bytes", headers={"connection": "close"})
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15 or int(length) > limit:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > limit:
                        raise too_large
        except TimeoutError:
            message_text = f"the body did not arrive within {self.limits.body_seconds:g} seconds"
            raise ApiError(408, "body_timeout", message_text, headers={"connection": "close"}) from None
        return b"".join(parts)


def _check_body(scope: Scope, body: bytes) -> None:
    headers = dict(scope["headers"])
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip()
    if body and encoding.lower() not in ("", "identity"):
        message = f"a body must not be compressed: send it without Content-Encoding: {encoding[:100]}"
        raise ApiError(415, "unsupported_encoding", message, headers={"accept-encoding": "identity"})
    if b"json" in headers.get(b"content-type", b"").lower() and sum(map(body.count, b",[{")) > MOST_VALUES:
        raise ApiError(400, "bad_json", f"a body may hold {MOST_VALUES} commas and brackets")


async def _linger(receive: Receive) -> None:
    """Read on for a moment: a connection that is closed while the client still sends is reset, and the answer lost."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while size < LINGER_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the app reads: the body that was read already, then whatever comes (a disconnect)."""
    left = [body]

    async def replay() -> Message:
        if not left:
            return await receive()
        return {"type": "http.request", "body": left.pop(), "more_body": False}  # an upload is not kept for longer

    return replay
