"""Nothing that a client sends holds the event loop up: probes are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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

GENERATE = "/v1/images/generations"
SECONDS = 0.1  # that an unknown name takes in these tests


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Ready but for its start; near names of unknown ones take their time, as among many classes."""
    made = make_engine()
    pipe = made._load()
    class_id = pipe.class_id
    running = threading.Lock()

    def slow(label: int | str | None) -> int:
        try:
            return class_id(label)
        except UnknownClass:
            assert running.acquire(blocking=False), "two at once"
            time.sleep(SECONDS)
            running.release()
            raise

    monkeypatch.setattr(pipe, "class_id", slow)
    return made


def until_ready(url: str) -> None:
    while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.01)


def test_unknown_prompts_stop_neither_probes_nor_known_prompts(engine: Engine) -> None:
    """Near names were looked for on the event loop: twenty unknown prompts stopped /health for 3 s."""
    with listening(create_app(engine, "tiny"), engine) as port, ThreadPoolExecutor(20) as pool:
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        unknown = [pool.submit(httpx.post, f"{url}{GENERATE}", json={"prompt": f"x{i}"}, timeout=30) for i in range(12)]
        time.sleep(SECONDS / 2)
        start = time.monotonic()
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.post(f"{url}{GENERATE}", json={"prompt": "cat"}).status_code == 200
        assert time.monotonic() - start < 6 * SECONDS and not all(one.done() for one in unknown)
        assert {one.result().json()["error"]["code"] for one in unknown} == {"unknown_class"}


def test_more_unknown_prompts_than_may_wait_are_429(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MOST_CHECKS", 3)
    with listening(create_app(engine, "tiny"), engine) as port, ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        answers = list(pool.map(lambda _: httpx.post(f"{url}{GENERATE}", json={"prompt": "x"}), range(8)))
        assert {answer.status_code for answer in answers} == {400, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "queue_full"
        assert httpx.post(f"{url}{GENERATE}", json={"prompt": "dog"}).status_code == 200
        assert httpx.post(f"{url}{GENERATE}", json={"prompt": "DOG"}).status_code == 200  # places are free again


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
