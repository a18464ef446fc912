"""The process: model, socket, uvicorn, signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Collection
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ecar.refine import critic_of
from ecar.sampling.pipeline import Pipeline
from ecar.serving.app import create_app
from ecar.serving.config import Limits, served_name
from ecar.serving.engine import Engine, own_critic
from ecar.serving.metrics import Metrics
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


def serve_model(
    load: Callable[[], Pipeline],
    model: str,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    critic: str | None = None,
    adapted: bool = False,
    keys: Collection[str] = (),
    cors_origins: Collection[str] = (),
) -> None:
    """Load a model, listen, and serve it until SIGTERM or SIGINT.

    Args:
        load: makes the pipeline, in the engine's thread.
        model: bundled name, folder or Hub id: where its critic is.
        limits: of the server.
        host, port: where to listen; port 0 takes a free one.
        name: of the model in the API; default: the last part of ``model``.
        critic: file of another critic than the model's own.
        adapted: ``load`` adds an adapter: its samples are others than those that a critic knows.
        keys, cors_origins: as of ``create_app``.

    Raises:
        ValueError: a model, critic or address that cannot be used.
    """
    if critic is not None and adapted:
        raise ValueError(f"--critic {critic} knows the samples of {model}, not those with --adapter")
    bound, name = bind(host, port), name or served_name(model)
    chooser = None if adapted else (lambda: own_critic(model) if critic is None else critic_of(model, critic))
    engine = Engine(load, limits, Metrics(), chooser)
    engine.start()  # a wrong model ends the process here
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"ecar: {name} at http://{shown}:{port} (API: /v1){', keys asked for' if keys else ''}", flush=True)
    serve(create_app(engine, name, keys=keys, cors_origins=cors_origins), engine, bound)
