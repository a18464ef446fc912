"""The process: socket, uvicorn, signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ecar.serving.engine import Engine
from ecar.serving.protocol import bounded_protocol

log = logging.getLogger("ecar.serving")


class _Server(uvicorn.Server):
    """On SIGTERM and SIGINT the engine refuses new work while uvicorn finishes what was accepted."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        log.info("signal %d: draining", sig)
        self._engine.drain()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn cancels what is left when its own time is up, and a stream would end as if it were complete.
        timer = asyncio.get_running_loop().call_later(self._engine.limits.drain_seconds, self._engine.abandon)
        await super().shutdown(sockets)
        timer.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ValueError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, proto=socket.IPPROTO_TCP)[0]
        # The protocol is named, else asyncio leaves Nagle's algorithm on, which holds a preview back for 40 ms.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error})") from None
    return bound


def make_server(app: ASGIApp, engine: Engine) -> uvicorn.Server:
    """uvicorn with the limits of the engine."""
    # Three seconds more than for draining: then errors are sent.
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="on",
        http=bounded_protocol(engine.limits), ws="none", timeout_graceful_shutdown=int(engine.limits.drain_seconds) + 3,
    )  # fmt: skip
    return _Server(config, engine)


def serve(app: ASGIApp, engine: Engine, bound: socket.socket) -> None:
    """Run until SIGTERM or SIGINT, then drain. Returns when all is done."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # The engine's thread takes Python's lock hundreds of times a stage; each time it would wait 5 ms for a busy loop.
    sys.setswitchinterval(0.0005)
    # uvicorn raises the signal again when it is done; a clean end is exit code 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    make_server(app, engine).run(sockets=[bound])
