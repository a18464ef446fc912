"""Nothing that a client sends holds the event loop up: probes are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice

import httpx
import pytest
from fastapi.testclient import TestClient

from ecar.sampling.classes import UnknownClass
from ecar.serving import app as app_module
from ecar.serving import schema
from ecar.serving.app import create_app
from ecar.serving.engine import Engine
from ecar.serving.errors import ApiError
from ecar.serving.threads import Threads
from served import listening, make_engine

pytestmark = pytest.mark.slow

GENERATE = "/v1/images/generations"


class Gate:
    """Unknown names are looked for until it opens, one at a time, as if there were very many classes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open, self._running = threading.Event(), threading.Event(), threading.Lock()
        pipe = engine._load()
        self._class_id = pipe.class_id
        monkeypatch.setattr(pipe, "class_id", self.class_id)

    def class_id(self, label: int | str | None) -> int:
        try:
            return self._class_id(label)
        except UnknownClass:
            assert self._running.acquire(blocking=False), "two at once"
            self.entered.set()
            assert self.open.wait(30)
            self._running.release()
            raise


def until_ready(url: str) -> None:
    while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.01)


def test_unknown_prompts_stop_neither_probes_nor_known_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near names were looked for on the event loop: twenty unknown prompts stopped /health for 3 s."""
    gate = Gate(engine := make_engine(), monkeypatch)
    with listening(create_app(engine, "tiny"), engine) as port, ThreadPoolExecutor(20) as pool:
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        unknown = [pool.submit(httpx.post, f"{url}{GENERATE}", json={"prompt": f"x{i}"}, timeout=60) for i in range(12)]
        try:
            assert gate.entered.wait(10)
            assert httpx.get(f"{url}/health", timeout=10).status_code == 200
            assert httpx.post(f"{url}{GENERATE}", json={"prompt": "cat"}, timeout=10).status_code == 200
            assert not any(one.done() for one in unknown)
        finally:
            gate.open.set()
        assert {one.result().json()["error"]["code"] for one in unknown} == {"unknown_class"}


def test_more_unknown_prompts_than_may_wait_are_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MOST_CHECKS", 3)
    gate = Gate(engine := make_engine(), monkeypatch)
    with listening(create_app(engine, "tiny"), engine) as port, ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        unknown = [pool.submit(httpx.post, f"{url}{GENERATE}", json={"prompt": "x"}, timeout=60) for _ in range(8)]
        try:
            refused = [one.result() for one in islice(as_completed(unknown, 20), 5)]
        finally:
            gate.open.set()
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert sorted(one.result().status_code for one in unknown) == [400] * 3 + [429] * 5
        answer = httpx.post(f"{url}{GENERATE}", json={"prompt": "DOG"})  # places are free again
        assert answer.status_code == 200


def test_threads_run_no_more_than_their_count_and_give_results_and_errors() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(value: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        if value == 5:
            raise KeyError(value)
        return value

    async def main() -> list[int | BaseException]:
        threads = Threads("test", 2, 9)
        found = await asyncio.gather(*(threads.run(work, i) for i in range(10)), return_exceptions=True)
        assert await threads.run(work, 1) == 1
        return found

    found = asyncio.run(main())
    assert most == 2 and found[:5] == [0, 1, 2, 3, 4] and found[6:9] == [6, 7, 8]
    assert isinstance(found[5], KeyError) and isinstance(found[9], ApiError) and found[9].status == 429


@pytest.mark.parametrize(
    "body",
    [
        {f"a{i}": 0 for i in range(80_000)},
        {"prompt": "cat", "svg": [[] for _ in range(200_000)]},
        {"prompt": "cat", "complexity": [{} for _ in range(200_000)]},
        {"prompt": "cat", "num_inference_steps": [0] * 300_000},
    ],
)
def test_bodies_of_very_many_values_are_refused_before_they_are_parsed(
    body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MiB of empty lists or unknown parameters took the event loop 0.3 s to read and to complain about."""
    parsed = list[object]()
    monkeypatch.setattr(json, "loads", lambda text, **_: parsed.append(text))
    content = json.dumps(body, separators=(",", ":")).encode()
    assert 2**18 < len(content) <= 2**20
    with TestClient(create_app(make_engine(), "tiny")) as client:
        headers = {"Content-Type": "application/json"}
        answer = client.post(GENERATE, content=content, headers=headers)
        assert not parsed
        monkeypatch.undo()
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_json")
        assert "4096 commas and brackets" in answer.json()["error"]["message"]


def test_classes_are_written_once_and_not_for_each_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand took the event loop 15 ms every time."""
    made = list[object]()
    info = schema.ClassInfo
    monkeypatch.setattr(schema, "ClassInfo", lambda **values: (made.append(values), info(**values))[1])
    with TestClient(create_app(make_engine(), "tiny")) as client:
        first, second = (client.get("/v1/models/tiny/classes") for _ in range(2))
    assert first.json() == second.json() and first.headers["content-type"] == "application/json"
    assert [one["name"] for one in first.json()["data"]] == ["cat", "dog", "Red bird"] and len(made) == 3
