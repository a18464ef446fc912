"""Clients that do not behave: they vanish, do not read, send slowly or too much. Real sockets, a tiny model."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from conftest import random_model, tiny_config
from ecar.sampling.pipeline import Pipeline
from ecar.serving import answers
from ecar.serving import engine as engine_module
from ecar.serving.app import create_app
from ecar.serving.config import Limits
from ecar.serving.engine import Engine
from ecar.serving.metrics import Metrics
from ecar.serving.rows import EngineError, Row
from ecar.tokenizers import PixelTokenizer
from served import listening

GENERATE = "/v1/images/generations"


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def tiny(**limits: object) -> Engine:
    """Started, of a tiny model."""
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    engine = Engine(lambda: pipe, replace(Limits(), **limits), Metrics())  # type: ignore[arg-type]
    engine.start()
    until(lambda: engine.state == "ready")
    return engine


def read_all(connection: socket.socket, seconds: float = 10.0) -> bytes:
    """Until the server closes; b"" too where it resets."""
    connection.settimeout(seconds)
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    ("stream", "leaves"),
    [
        (False, "at once"),
        (False, "in progress"),
        (True, "at once"),
        (True, "while the head is sent"),
        (True, "after the head"),
        (True, "after a preview"),
        (True, "while an event is sent"),
    ],
)
def test_rows_of_a_client_that_left_are_cancelled_whenever_it_left(stream: bool, leaves: str) -> None:
    """A stream's generator that was never started runs no ``finally``: rows of a client that took no byte were computed
    to their end."""
    engine, rows, sent = tiny(), list[Row](), list[Message]()
    app, submit = create_app(engine, "tiny"), engine.submit
    engine.submit = lambda new: (rows.extend(new), submit(new))[1]  # type: ignore[method-assign]
    wanted = {"prompt": "cat", "n": 4, "num_inference_steps": [10, 55, 55], "stream": stream}
    body = json.dumps(wanted | ({"partial_images": 3} if stream else {})).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": GENERATE, "raw_path": GENERATE.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip

    async def talk() -> None:
        gone, asked = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            if leaves == "in progress":
                await asyncio.sleep(0.01)  # longer, and a fast machine has finished
            elif leaves != "at once":
                await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if leaves == "after the head" or (leaves == "after a preview" and len(sent) == 2):
                gone.set()
            elif len(sent) == {"while the head is sent": 1, "while an event is sent": 2}.get(leaves):
                gone.set()
                await asyncio.sleep(3600)

        await asyncio.wait_for(app(scope, receive, send), 20)

    try:
        asyncio.run(talk())
        assert len(rows) == 4 and all(row.cancelled for row in rows)
        until(lambda: not (engine._running or engine._scheduler.new or engine._scheduler.chunks))
        assert 'ecar_images_dropped_total{reason="cancelled"}' in engine.metrics.text().decode()
    finally:
        engine.stop()


def test_rows_of_vanished_clients_hold_no_place_in_the_queue() -> None:
    engine = tiny(max_queue=10, max_batch=1)
    settings = engine.pipe.settings(steps=40)
    slow = Row(0, 0, settings, lambda _: None)
    gone = [Row(0, i, settings, lambda _: None) for i in range(10)]
    engine.submit([slow])
    until(lambda: not engine._scheduler.new)
    engine.submit(gone)
    with pytest.raises(EngineError):
        engine.submit([Row(0, 99, settings, lambda _: None)])
    for row in gone:
        row.cancelled = True
    engine.submit([Row(0, i, settings, lambda _: None) for i in range(10)])
    engine.stop()


async def live(receive: Receive, send: Send) -> None:
    """The lifespan of an app that needs nothing."""
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})


def test_client_that_never_reads_is_cut_off_and_little_is_buffered_for_it() -> None:
    engine, sent, ended = tiny(send_seconds=0.3), [0], list[str]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await live(receive, send)
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):  # 128 MB
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
            sent[0] += 2**16
            if (await_gone := asyncio.ensure_future(receive())).done():
                await_gone.result()
            await asyncio.sleep(0)
            if await_gone.done():
                ended.append(await_gone.result()["type"])
                return
            await_gone.cancel()

    with listening(app, engine) as port, socket.create_connection(("127.0.0.1", port)) as deaf:
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: bool(ended))
    assert ended == ["http.disconnect"] and sent[0] < 2**25
    engine.stop()


def test_slow_but_steady_reader_gets_everything() -> None:
    engine = tiny(send_seconds=0.3)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await live(receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": bytes(2**23), "more_body": False})

    with listening(app, engine) as port, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        slow.connect(("127.0.0.1", port))
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        count, start = 0, time.monotonic()
        while part := slow.recv(2**16):
            count += len(part)
            time.sleep(0.005)
    assert count > 2**23 and time.monotonic() - start > 0.6
    engine.stop()


@pytest.mark.parametrize("head", ["", "GET /health HT", "second"])
def test_head_that_does_not_come_or_comes_byte_by_byte_closes_the_connection(head: str) -> None:
    engine = tiny(head_seconds=0.5)
    with (
        listening(create_app(engine, "tiny"), engine) as port,
        socket.create_connection(("127.0.0.1", port)) as slow,
    ):
        if head == "second":  # one byte after an answer stops uvicorn's own timer
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert slow.recv(1000).startswith(b"HTTP/1.1 200")
            head = "G"
        start = time.monotonic()
        slow.sendall(head.encode())
        slow.settimeout(0.1)
        data = b"x"
        while data and time.monotonic() - start < 10:
            try:
                data = slow.recv(1000)
            except TimeoutError:
                slow.sendall(b"x")
            except ConnectionError:
                break
        assert 0.4 < time.monotonic() - start < 8
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_more_connections_than_allowed_are_refused_in_the_envelope_and_probes_are_not() -> None:
    engine = tiny(max_connections=4, head_seconds=1.0)
    with listening(create_app(engine, "tiny"), engine) as port:
        url = f"http://127.0.0.1:{port}"
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        time.sleep(0.1)
        refused = httpx.post(f"{url}{GENERATE}", json={"prompt": "cat"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert refused.headers["retry-after"] == "1" and refused.headers["x-request-id"]
        assert httpx.get(f"{url}/health").status_code == 200
        idle += [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        assert read_all(idle[-1]) == b""  # closed at once
        until(lambda: _status(url) == 200)  # the others were closed when no head came
        for one in idle:
            one.close()


def _status(url: str) -> int:
    try:
        return httpx.post(f"{url}{GENERATE}", json={"prompt": "cat"}).status_code
    except httpx.TransportError:
        return 0


def test_what_is_not_http_is_answered_400_in_the_envelope() -> None:
    engine = tiny()
    huge = b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n"
    with listening(create_app(engine, "tiny"), engine) as port:
        for data in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", huge):
            with socket.create_connection(("127.0.0.1", port)) as odd:
                odd.sendall(data)
                answer = read_all(odd)
            if data is not huge or answer:  # much of it unread: the connection may be reset
                head, body = answer.split(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "bad_request"
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_body_over_the_limit_is_answered_413_while_the_client_still_sends() -> None:
    """Closed at once, the connection was reset and the client saw a broken pipe instead of the answer."""
    engine = tiny()
    with listening(create_app(engine, "tiny"), engine) as port:
        url = f"http://127.0.0.1:{port}{GENERATE}"
        big = {"prompt": "x" * 3 * 2**20}
        answer = httpx.post(url, json=big)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        data = json.dumps(big).encode()
        chunks = (data[i : i + 2**16] for i in range(0, len(data), 2**16))
        assert httpx.post(url, content=chunks, headers={"Content-Type": "application/json"}).status_code == 413
        with socket.create_connection(("127.0.0.1", port)) as expecting:
            expecting.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n")
            assert read_all(expecting).startswith(b"HTTP/1.1 413")


def test_error_inside_the_server_has_envelope_request_id_and_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It used to pass the middleware by: no x-request-id, and counted as status 0."""

    def broken(*_: object) -> None:
        raise KeyError("s3cret")

    monkeypatch.setattr("ecar.serving.app.make_order", broken)
    engine = tiny()
    with caplog.at_level(logging.INFO), listening(create_app(engine, "tiny"), engine) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        answer = httpx.post(f"http://127.0.0.1:{port}{GENERATE}", json={"prompt": "cat"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert "s3cret" not in answer.text and answer.headers["x-request-id"].startswith("req_")
        assert "nosniff" in answer.headers["x-content-type-options"]
        until(lambda: 'ecar_http_responses_total{status="500"} 1.0' in engine.metrics.text().decode())
    lines = [record.message for record in caplog.records if record.name == "ecar.serving"]
    assert any(GENERATE in line for line in lines) and not any(
        "/health" in line for line in lines
    )  # probes only fill logs


def test_image_that_cannot_be_encoded_ends_its_stream_with_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise OSError("encoder error -2")

    monkeypatch.setattr(answers, "_encode", broken)
    engine = tiny()
    with listening(create_app(engine, "tiny"), engine) as port:
        text = httpx.post(f"http://127.0.0.1:{port}{GENERATE}", json={"prompt": "cat", "stream": True}).text
    assert text.startswith("event: error\n") and json.loads(text.split("data: ")[1])["error"]["type"] == "server_error"


def test_crash_of_the_engine_in_mid_stream_is_one_error_event_after_the_previews(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "BACKOFF", 0.01)
    engine = tiny()
    tokens, pipe = engine.pipe.model.head.embed_tokens, engine.pipe
    tripped: list[bool] = []

    def breaks_once(stage: object, maps: object) -> object:
        if getattr(stage, "index", 0) == 2 and not tripped:
            tripped.append(True)
            raise RuntimeError("device lost")
        return tokens(stage, maps)

    pipe.model.head.embed_tokens = breaks_once
    with listening(create_app(engine, "tiny"), engine) as port:
        url = f"http://127.0.0.1:{port}"
        text = httpx.post(f"{url}{GENERATE}", json={"prompt": "cat", "stream": True, "partial_images": 2}).text
        events = [block.split("\n") for block in text.strip().split("\n\n")]
        kinds = [event[0].removeprefix("event: ") for event in events]
        assert kinds == ["image_generation.partial_image"] * (len(events) - 1) + ["error"] and len(events) > 1, text
        assert json.loads(events[-1][1].removeprefix("data: "))["error"]["code"] == "engine_failed"
        until(lambda: engine.state == "ready")
        assert httpx.post(f"{url}{GENERATE}", json={"prompt": "cat"}).status_code == 200
