"""The process: socket, uvicorn, signals."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ecar.serving.config import Limits
from ecar.serving.engine import Engine

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


def serve(app: FastAPI, engine: Engine, bound: socket.socket, limits: Limits) -> None:
    """Run until SIGTERM or SIGINT, then drain. Returns when all is done."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # The engine's thread takes Python's lock hundreds of times a stage; each time it would wait 5 ms for a busy loop.
    sys.setswitchinterval(0.0005)
    # uvicorn raises the signal again when it is done; a clean end is exit code 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="on",
        limit_concurrency=limits.max_connections, timeout_graceful_shutdown=int(limits.drain_seconds) or 1,
    )  # fmt: skip
    _Server(config, engine).run(sockets=[bound])
