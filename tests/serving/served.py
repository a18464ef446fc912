"""What the tests of the server share: a server process, and an engine for an app in this process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
import pytest
from starlette.types import ASGIApp

from conftest import random_model, tiny_config
from ecar.sampling.pipeline import Pipeline
from ecar.serving.config import Limits
from ecar.serving.engine import Engine
from ecar.serving.metrics import Metrics
from ecar.serving.server import bind, make_server
from ecar.tokenizers import PixelTokenizer

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def make_engine(pipe: Pipeline | None = None, **changes: object) -> Engine:
    """Not started; a tiny random model, or one of ours."""
    pipe = pipe or Pipeline(random_model(tiny_config(**changes)), PixelTokenizer(factor=1))
    return Engine(lambda: pipe, Limits(body_seconds=1.0), Metrics())


@contextmanager
def listening(app: ASGIApp, engine: Engine) -> Iterator[int]:
    """The app behind real sockets, in a thread of this process; gives the port."""
    with bind("127.0.0.1", 0) as bound:
        inner = make_server(app, engine)
        thread = threading.Thread(target=inner.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not inner.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
        inner.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class ServerProcess:
    """``ecar serve`` of "fashion" (it is quick), or of the model that is named; ``log`` grows as it runs."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None) -> None:
        words = [*map(str, arguments)]
        model = [] if words and not words[0].startswith("-") else ["fashion"]
        command = [sys.executable, "-m", "ecar", "serve", *model, "--port", "0", *words]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **(environment or {})},
        )
        assert self.process.stdout is not None
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.line)
        assert found is not None, (self.line, self.log, self.process.poll())
        self.url = found[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(40)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The bundled model, served."""
    started = ServerProcess()
    _wait_until_ready(started.url)
    yield started
    assert started.stop() == 0


def _wait_until_ready(url: str) -> None:
    for _ in range(400):
        if httpx.get(f"{url}/ready").status_code == 200:
            return
        time.sleep(0.05)
    raise AssertionError("the server did not become ready")


@pytest.fixture
def start() -> Iterator[object]:
    """Start servers with options; they are stopped at the end."""
    started: list[ServerProcess] = []

    def begin(arguments: Sequence[object] = (), **environment: str) -> ServerProcess:
        started.append(ServerProcess(*arguments, environment=environment))
        _wait_until_ready(started[-1].url)
        return started[-1]

    yield begin
    for one in started:
        one.stop()
