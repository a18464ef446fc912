"""Images under URLs: kept for a while, within bounds, under names that nobody guesses."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from conftest import random_model, tiny_config
from ecar.sampling.pipeline import Pipeline
from ecar.serving.app import create_app
from ecar.serving.config import Limits, check_public_url
from ecar.serving.engine import Engine
from ecar.serving.files import FileStore
from ecar.serving.metrics import Metrics
from ecar.tokenizers import PixelTokenizer

GENERATE = "/v1/images/generations"


KEY = {"Authorization": "Bearer secret"}


@contextmanager
def serving(public_url: str | None = None) -> Iterator[TestClient]:
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    engine = Engine(lambda: pipe, replace(Limits(), url_ttl=60.0), Metrics())
    with TestClient(create_app(engine, "tiny", keys=["secret"], public_url=public_url)) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.fixture(scope="module")
def api() -> Iterator[TestClient]:
    with serving() as client:
        yield client


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "gif"])
def test_url_gives_the_image_of_the_answer_with_its_type_and_without_a_key(api: TestClient, form: str) -> None:
    key = {"Authorization": "Bearer secret"}
    answer = api.post(GENERATE, json={"prompt": "cat", "n": 2, "output_format": form}, headers=key).json()
    assert len({image["url"] for image in answer["data"]}) == 2
    for image in answer["data"]:
        found = api.get(image["url"])
        assert found.content == base64.b64decode(image["b64_json"])
        assert found.headers["content-type"] == f"image/{form}"
        assert found.headers["x-content-type-options"] == "nosniff"
    only = api.post(GENERATE, json={"prompt": "cat", "response_format": "url"}, headers=key).json()["data"][0]
    assert set(only) == {"url", "seed"} and api.get(only["url"]).status_code == 200


@pytest.mark.parametrize(("asked", "told"), [("url", {"url"}), ("b64_json", {"b64_json"}), (None, {"url", "b64_json"})])
def test_the_answer_has_the_form_that_was_asked_for_and_no_other(
    api: TestClient, asked: str | None, told: set[str]
) -> None:
    """With b64_json a url came too, which some clients prefer and then refuse to fetch."""
    answer = api.post(GENERATE, json={"prompt": "dog", "n": 2, "response_format": asked}, headers=KEY)
    assert [set(image) - {"seed"} for image in answer.json()["data"]] == [told] * 2


@pytest.mark.parametrize("base", ["https://images.example.com", "https://example.com:8443/ecar"])
def test_urls_begin_with_the_public_address_behind_a_proxy(base: str) -> None:
    """They said http and the name that the proxy has for the server."""
    with serving(public_url=base) as api:
        image = api.post(GENERATE, json={"prompt": "cat", "response_format": "url"}, headers=KEY).json()["data"][0]
        assert image["url"].startswith(f"{base}/v1/files/")
        assert api.get(image["url"].removeprefix(base)).status_code == 200


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://Example.com:443/", "https://example.com"),
        ("http://example.com:80/a/", "http://example.com/a"),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_public_addresses_are_written_one_way(given: str, kept: str) -> None:
    assert check_public_url(given) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        "example.com",
        "ftp://x.com",
        "https://",
        "https://x.com:99999",
        "https://x.com?a",
        "https://u:p@x.com",
        "https://a b",
    ],
)
def test_wrong_public_addresses_are_refused_and_name_the_flag(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"--public-url .*give the address"):
        check_public_url(wrong)


def test_other_names_other_paths_and_the_rest_of_the_api_stay_closed(api: TestClient) -> None:
    for path in ("/v1/files/x.png", "/v1/files/..%2f..%2fetc%2fpasswd", "/v1/files/"):
        assert api.get(path).status_code == 404
    assert api.get("/v1/models").status_code == 401
    stream = {"prompt": "cat", "response_format": "url", "stream": True}
    refused = api.post(GENERATE, json=stream, headers={"Authorization": "Bearer secret"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


def test_time_and_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = FileStore(10.0, 100)
    first, second = store.put(b"a" * 60, "png"), store.put(b"b" * 40, "png")
    assert store.get(first) and store.get(second)
    third = store.put(b"c" * 50, "png")
    assert store.get(first) is None and store.get(second) and store.size == 90
    now[0] = 10.0
    assert store.get(third) is None and store.size == 0
