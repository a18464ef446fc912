"""Images under URLs: kept for a while, within bounds, under names that nobody guesses."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from conftest import random_model, tiny_config
from ecar.sampling.pipeline import Pipeline
from ecar.serving.app import create_app
from ecar.serving.config import Limits
from ecar.serving.engine import Engine
from ecar.serving.files import FileStore
from ecar.serving.metrics import Metrics
from ecar.tokenizers import PixelTokenizer

GENERATE = "/v1/images/generations"


@pytest.fixture
def api() -> Iterator[TestClient]:
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    engine = Engine(lambda: pipe, replace(Limits(), url_ttl=60.0), Metrics())
    with TestClient(create_app(engine, "tiny", keys=["secret"])) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
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
