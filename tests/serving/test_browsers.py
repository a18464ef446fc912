"""What browsers, proxies and probes ask besides GET and POST: HEAD, OPTIONS, and pages of other sites (CORS)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi.testclient import TestClient

from ecar.serving.app import create_app
from ecar.serving.config import check_origins
from served import listening, make_engine

pytestmark = pytest.mark.slow

GENERATE = "/v1/images/generations"
SITE, OTHER = "https://app.example.com", "https://evil.example.com"
KEY = {"Authorization": "Bearer k"}
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


@contextmanager
def serving(*origins: str, keys: tuple[str, ...] = ("k",)) -> Iterator[TestClient]:
    app = create_app(make_engine(), "tiny", keys=keys, cors_origins=check_origins(origins, "--cors-origin"))
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.fixture(scope="module")
def api() -> Iterator[TestClient]:
    with serving(SITE, "app://obsidian.md") as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/v1/models/tiny/classes",
             "/openapi.json", "/static/page.js", "/v2/nothing"]
)  # fmt: skip
def test_head_is_answered_as_get_is_without_the_body(api: TestClient, path: str) -> None:
    """It was 405: probes and uptime checks ask so."""
    head, get = api.head(path, headers=KEY), api.get(path, headers=KEY)
    assert head.status_code == get.status_code and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # which counts what was asked before
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_asks_for_a_key_where_get_does_and_is_no_way_around_post(api: TestClient) -> None:
    refused = api.head("/v1/models")
    assert refused.status_code == 401 and refused.content == b""
    assert api.head(GENERATE, headers=KEY).status_code == 405


def test_head_over_a_real_socket_leaves_the_connection_usable() -> None:
    engine = make_engine()
    with listening(create_app(engine, "tiny"), engine) as port, httpx.Client() as client:
        for method in ("HEAD", "GET", "HEAD", "GET"):
            answer = client.request(method, f"http://127.0.0.1:{port}/health")
            assert answer.status_code == 200 and bool(answer.content) == (method == "GET")
        assert int(client.head(f"http://127.0.0.1:{port}/v1/models").headers["content-length"]) > 100


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/health", "GET, HEAD, OPTIONS"), ("/v1/models", "GET, HEAD, OPTIONS"), (GENERATE, "OPTIONS, POST"),
     ("/static/page.js", "GET, HEAD, OPTIONS")],
)  # fmt: skip
def test_options_says_what_is_allowed_without_a_key(api: TestClient, path: str, allowed: str) -> None:
    answer = api.options(path)
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, allowed, b"")
    refused = api.request("DELETE", path, headers=KEY)
    assert refused.status_code == 405 and refused.headers["allow"] == allowed
    assert refused.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("origin", [SITE, "app://obsidian.md"])
@pytest.mark.parametrize("path", [GENERATE, "/v1/models"])
def test_a_preflight_of_a_listed_page_passes_without_a_key(api: TestClient, origin: str, path: str) -> None:
    """It was 405, and 401 where keys are asked for: browsers send none with it."""
    answer = api.options(path, headers={"Origin": origin, **PREFLIGHT})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert {"authorization", "x-stainless-lang"} <= set(answer.headers["access-control-allow-headers"].split(","))


def test_a_preflight_of_another_page_is_refused(api: TestClient) -> None:
    with serving() as closed:
        for client, origin in ((api, OTHER), (api, f"{SITE}.evil.com"), (api, "null"), (closed, SITE)):
            answer = client.options(GENERATE, headers={"Origin": origin, **PREFLIGHT})
            assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-origin" not in closed.get("/health", headers={"Origin": SITE}).headers
    deleting = api.options(GENERATE, headers={"Origin": SITE, "Access-Control-Request-Method": "DELETE"})
    assert deleting.status_code == 400 and deleting.headers["access-control-allow-methods"] == "GET, HEAD, POST"


def test_answers_errors_and_streams_carry_the_headers_for_listed_pages_only(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them a page sees no status and no message, only that something failed."""

    def bug(*_: object) -> None:
        raise KeyError

    large = "x" * 2**21
    requests = [
        ("GET", "/health", None, 200), ("GET", "/v2/x", None, 404), ("DELETE", GENERATE, None, 405),
        ("POST", GENERATE, {"prompt": "cat"}, 200), ("POST", GENERATE, {"prompt": "cat", "stream": True}, 200),
        ("POST", GENERATE, {"prompt": "horse"}, 400), ("POST", GENERATE, {"prompt": large}, 413),
    ]  # fmt: skip
    for origin in (SITE, OTHER):
        headers = {"Origin": origin, **KEY}
        answers = [(status, api.request(m, path, json=body, headers=headers)) for m, path, body, status in requests]
        answers.append((401, api.get("/v1/models", headers={"Origin": origin})))
        with monkeypatch.context() as patch:
            patch.setattr("ecar.serving.app.make_order", bug)
            answers.append((500, api.post(GENERATE, json={"prompt": "cat"}, headers=headers)))
        for status, answer in answers:
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == (SITE if origin == SITE else None)
            assert "Origin" in answer.headers["vary"]
    exposed = api.get("/health", headers={"Origin": SITE}).headers["access-control-expose-headers"]
    assert {"x-request-id", "retry-after"} <= set(exposed.split(", "))


def test_a_stream_reaches_a_listed_page_over_a_real_socket() -> None:
    engine = make_engine()
    app = create_app(engine, "tiny", cors_origins=[SITE])
    with listening(app, engine) as port:
        url = f"http://127.0.0.1:{port}"
        while httpx.get(f"{url}/ready").status_code != 200:
            time.sleep(0.01)
        body = {"prompt": "cat", "stream": True, "partial_images": 2}
        with httpx.stream("POST", f"{url}{GENERATE}", json=body, headers={"Origin": SITE}) as answer:
            assert answer.headers["access-control-allow-origin"] == SITE
            events = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert len(events) == 3 and json.loads(events[-1][6:])["type"] == "image_generation.completed"


def test_a_star_lets_every_page_in() -> None:
    with serving("*") as client:
        for origin in (OTHER, "null"):
            assert client.options(GENERATE, headers={"Origin": origin, **PREFLIGHT}).status_code == 200
            assert client.get("/v1/models", headers={"Origin": origin}).headers["access-control-allow-origin"] == "*"


def test_origins_are_written_as_browsers_send_them() -> None:
    given = ["https://App.Example.com", "http://localhost:3000", "https://x.org:443", "http://[::1]:80", "*"]
    wanted = ("https://app.example.com", "http://localhost:3000", "https://x.org", "http://[::1]", "*")
    assert check_origins(given, "--cors-origin") == wanted


@pytest.mark.parametrize(
    "wrong",
    ["", "app.example.com", "localhost:3000", "https://x.com/", "https://x.com/a", "https://*.x.com", "https://x.com:y",
     "https://x.com:0", "https://x.com:99999", "https://x.com:", "https://x.com?a", "https://a b", "https://u@x.com",
     "https://bücher.example", "null", "fashion"],
)  # fmt: skip
def test_origins_that_could_never_match_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"--cors-origin .*: give scheme://host"):
        check_origins([SITE, wrong], "--cors-origin")
