"""Bounds of a connection that uvicorn leaves open: the time for a request's head, and what a client does not read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ecar.serving.config import Limits
from ecar.serving.errors import ApiError
from ecar.serving.middleware import CROWDED

MIN_TAKEN = 2**14  # bytes that a client has to take within ``send_seconds``, or all there are


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 with the limits of a server: a class, as uvicorn wants it."""
    return type("Bounded", (_Bounded,), {"limits": limits})


class _Bounded(H11Protocol):
    limits: Limits
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came: answered, refused with a 503, or dropped, by how many there are."""
        super().connection_made(transport)
        # No high-water mark: whatever a client has not taken is watched, and nothing is added to it.
        transport.set_write_buffer_limits(high=0)
        count = len(self.connections)
        if count > 2 * self.limits.max_connections:
            transport.abort()
        elif count > self.limits.max_connections:
            app: Any = self.app

            async def crowded(scope: Scope, receive: Receive, send: Send) -> None:
                await app({**scope, CROWDED: True}, receive, send)

            self.app = crowded  # type: ignore[assignment]
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """uvicorn's own timer covers silence after an answer only, not a first request or a head sent byte by byte."""
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting and self._head is not None:
            self._head.cancel()
            self._head = None
        elif waiting and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.limits.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _watch_reader(self) -> None:
        before = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() > max(0, before - MIN_TAKEN):
                self.transport.abort()
            else:
                self._watch_reader()

        self._stall = self.loop.call_later(self.limits.send_seconds, check)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets the API's JSON error too."""
        error = ApiError(400, "bad_request", msg)
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun: it cannot be replaced
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
