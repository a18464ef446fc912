"""The app in this process: bad input of every kind gets OpenAI's envelope, and never a 5xx."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from conftest import random_model, tiny_config
from ecar.config import SamplingConfig
from ecar.sampling.classes import AmbiguousClass
from ecar.sampling.pipeline import Pipeline
from ecar.serving.app import create_app
from ecar.serving.config import Limits
from ecar.serving.engine import Engine
from ecar.serving.metrics import Metrics
from ecar.serving.order import _class_id
from ecar.tokenizers import PixelTokenizer
from served import make_engine

GENERATE = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def api() -> Iterator[TestClient]:
    engine = make_engine()
    with TestClient(create_app(engine, "tiny"), raise_server_exceptions=False) as client:
        while client.get("/ready").status_code != 200:
            pass
        yield client


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": "horse"}, "prompt", "unknown_class"),
        ({"prompt": "9" * 5000}, "prompt", "unknown_class"),
        ({"prompt": "cat\x00\r\nINFO forged"}, "prompt", "unknown_class"),
        ({"prompt": ["cat"]}, "prompt", "invalid_value"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"size": "99999x1"}, "size", "unsupported_size"),
        ({"partial_images": -1}, "partial_images", "invalid_value"),
        ({"partial_images": 2}, "partial_images", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"seed": -2}, "seed", "invalid_value"),
        ({"seed": -1.5}, "seed", "invalid_value"),
        ({"seed": 2.0**64}, "seed", "invalid_value"),
        ({"n": 2.5}, "n", "invalid_value"),
        ({"n": 11.0}, "n", "invalid_value"),
        ({"num_inference_steps": [2.0, 2.5, 2]}, "num_inference_steps", "invalid_value"),
        ({"seed": 2**53 - 1, "n": 2}, "seed", "invalid_value"),
        ({"num_inference_steps": 10**9}, "num_inference_steps", "invalid_value"),
        ({"num_inference_steps": 100}, "num_inference_steps", "too_many_steps"),
        ({"num_inference_steps": [4, 4]}, "num_inference_steps", "invalid_value"),
        ({"guidance_scale": 1e6}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": True}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale", "invalid_value"),
        ({"solver": "magic"}, "solver", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported_value"),
        ({"response_format": "url"}, "response_format", "unsupported_value"),
        ({"response_format": "url", "stream": True}, "response_format", "unsupported_value"),
        ({"negative_prompt": "dog"}, "negative_prompt", "unsupported_value"),
        ({"svg": {}}, "svg", "unsupported_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"image_url": "http://169.254.169.254/"}, "image_url", "unknown_parameter"),
        ({"model": "../../etc/passwd"}, "model", "model_not_found"),
    ],
)
def test_wrong_values_are_refused_before_any_work_and_name_the_parameter(
    api: TestClient, change: dict[str, object], param: str, code: str
) -> None:
    answer = api.post(GENERATE, json={"prompt": "cat", **change})
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert "\n" not in error["message"] and len(error["message"]) <= 1000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "cat", "guidance_scale": NaN}',
        b'{"prompt": "cat", "guidance_scale": 1e999}',
        b'{"prompt": "cat", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 4000,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "cat"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "cat", "prompt2": "\x00"}',
    ],
)
def test_malformed_bodies_are_answered_400_in_the_envelope(api: TestClient, body: bytes) -> None:
    answer = api.post(GENERATE, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_forms_that_a_foreign_page_could_send_without_asking_are_refused(api: TestClient) -> None:
    """A browser sends text/plain to another site without a preflight request; JSON it does not."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = api.post(GENERATE, content=b'{"prompt": "cat"}', headers={"Content-Type": kind})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_body_over_the_limit_is_refused_by_its_length_and_by_its_bytes(api: TestClient) -> None:
    big = json.dumps({"prompt": "x" * 2**21}).encode()
    assert api.post(GENERATE, content=big, headers=JSON).json()["error"]["code"] == "body_too_large"
    chunks = (big[i : i + 65536] for i in range(0, len(big), 65536))  # no Content-Length
    answer = api.post(GENERATE, content=chunks, headers=JSON)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_unknown_routes_and_methods_have_the_envelope_too(api: TestClient) -> None:
    for method, path, status in (
        ("GET", "/v2/x", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/static/..%2fapp.py", 404),
    ):
        answer = api.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_every_accepted_option_gives_an_image(api: TestClient) -> None:
    body = {
        "prompt": "Red bird", "model": "tiny", "n": 2, "size": "12x8", "quality": "hd", "output_format": "png",
        "background": "opaque", "response_format": "b64_json", "seed": 3, "guidance_scale": [2, 1.0, 1.5],
        "num_inference_steps": [1, 2, 3], "solver": "heun", "user": "u", "style": "vivid", "moderation": "low",
        "svg": None, "negative_prompt": "", "stream": False, "partial_images": 0,
    }  # fmt: skip
    answer = api.post(GENERATE, json=body, headers={"OpenAI-Organization": "o", "X-Stainless-Lang": "python"})
    assert answer.status_code == 200, answer.text
    assert [d["seed"] for d in answer.json()["data"]] == [3, 4] and answer.json()["size"] == "12x8"


def test_without_a_seed_images_differ_and_the_seed_is_told(api: TestClient) -> None:
    first, second = (api.post(GENERATE, json={"prompt": "cat"}).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"] and first["b64_json"] != second["b64_json"]
    again = api.post(GENERATE, json={"prompt": "cat", "seed": first["seed"]}).json()["data"][0]
    assert again == first


def test_quality_chooses_the_steps(api: TestClient) -> None:
    images = {
        q: api.post(GENERATE, json={"prompt": "cat", "seed": 1, "quality": q}).json()["data"][0]["b64_json"]
        for q in ("low", "auto", "medium", "high", "max")
    }
    assert images["auto"] == images["medium"] and len(set(images.values())) == 4
    steps = {"prompt": "cat", "seed": 1, "num_inference_steps": [6, 4, 4], "quality": "high"}
    assert api.post(GENERATE, json=steps).json()["data"][0]["b64_json"] == images["high"]


def test_quality_leaves_the_steps_of_a_model_that_was_distilled_for_them() -> None:
    fixed = SamplingConfig(steps=(2, 1, 1), guidance=(1.0,) * 3, fixed_steps=True)
    pipe = Pipeline(random_model(tiny_config(sampling=fixed)), PixelTokenizer(factor=1))
    with TestClient(create_app(make_engine(pipe), "tiny")) as client:
        while client.get("/ready").status_code != 200:
            pass
        orders = [{"prompt": "cat", "seed": 1, "quality": q} for q in ("low", "auto", "max")]
        assert len({client.post(GENERATE, json=order).json()["data"][0]["b64_json"] for order in orders}) == 1


def test_failure_inside_a_stream_is_an_error_event_not_a_silent_end() -> None:
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    pipe.model.head.class_embedding.weight.data[1] = float("nan")
    engine = make_engine(pipe)
    with TestClient(create_app(engine, "tiny")) as client:
        while client.get("/ready").status_code != 200:
            pass
        text = client.post(GENERATE, json={"prompt": "dog", "stream": True}).text
        assert (
            text.startswith("event: error\ndata: ")
            and json.loads(text.split("data: ")[1])["error"]["code"] == "not_finite"
        )
        plain = client.post(GENERATE, json={"prompt": "dog"})
        assert plain.status_code == 500 and plain.headers["x-should-retry"] == "false"
        assert client.post(GENERATE, json={"prompt": "cat"}).status_code == 200
        assert "ecar_images_not_finite_total 2.0" in client.get("/metrics").text


def test_stream_has_no_fields_that_the_official_client_cannot_read(api: TestClient) -> None:
    answer = api.post(GENERATE, json={"prompt": "cat", "stream": True, "partial_images": 2, "n": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    assert len(events) == 6 and all([line.split(": ")[0] for line in e] == ["event", "data"] for e in events)
    bodies = [json.loads(e[1].removeprefix("data: ")) for e in events]
    assert sorted((b["image_index"], b.get("partial_image_index", 9)) for b in bodies) == [
        (i, j) for i in (0, 1) for j in (0, 1, 9)
    ]


def test_of_a_list_the_message_says_what_is_wrong_with_the_list(api: TestClient) -> None:
    """It said that a list is no number, whatever was wrong in it."""
    for change, words in (
        ({"num_inference_steps": [0, 2, 2]}, "greater than or equal to 1"),
        ({"num_inference_steps": []}, "at least 1 item"),
        ({"guidance_scale": [200, 1, 1]}, "less than or equal to 100"),
        ({"num_inference_steps": "x"}, "valid integer"),
    ):
        assert words in api.post(GENERATE, json={"prompt": "cat", **change}).json()["error"]["message"]


def test_a_body_without_its_content_type_is_told_to_have_one(api: TestClient) -> None:
    answer = api.post(GENERATE, content=b'{"prompt": "cat"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_too_many_steps_by_quality_blame_the_quality() -> None:
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    engine = Engine(lambda: pipe, Limits(max_steps=7), Metrics())
    with TestClient(create_app(engine, "tiny")) as client:
        while client.get("/ready").status_code != 200:
            pass
        error = client.post(GENERATE, json={"prompt": "cat", "quality": "max"}).json()["error"]
        assert (error["code"], error["param"]) == ("too_many_steps", "quality")


def test_usage_of_events_adds_up_to_that_of_the_request(api: TestClient) -> None:
    """Each of n events carried the usage of all n images."""
    request = {"prompt": "cat", "n": 3, "seed": 0}
    whole = api.post(GENERATE, json=request).json()["usage"]["output_tokens"]
    lines = api.post(GENERATE, json={**request, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert sum(event["usage"]["output_tokens"] for event in events) == whole


def test_a_name_that_two_classes_have_is_ambiguous_and_not_the_first() -> None:
    pipe = Pipeline(random_model(tiny_config(class_names=("crane", "dog", "crane"))), PixelTokenizer(factor=1))
    with pytest.raises(AmbiguousClass, match="id 2"):
        pipe.class_id("crane")


def test_class_names_with_synonyms_and_ambiguous_ones() -> None:
    engine = make_engine(class_names=("crane, bird", "crane, machine", "tench, Tinca tinca"))
    with TestClient(create_app(engine, "tiny")) as client:
        while client.get("/ready").status_code != 200:
            pass
        error = client.post(GENERATE, json={"prompt": "Crane"}).json()["error"]
        assert error["code"] == "ambiguous_class" and "id 1" in error["message"]
        named, by_id = (
            client.post(GENERATE, json={"prompt": p, "seed": 0}).json()["data"] for p in ("tinca tinca", "2")
        )
        assert named == by_id


def test_model_without_classes_serves_any_prompt() -> None:
    engine = make_engine(num_classes=0, class_names=())
    with TestClient(create_app(engine, "plain")) as client:
        while client.get("/ready").status_code != 200:
            pass
        assert client.post(GENERATE, json={"prompt": "anything"}).status_code == 200
        refused = client.post(GENERATE, json={"prompt": "anything", "guidance_scale": 2.0})
        assert refused.status_code == 400 and "without labels" in refused.json()["error"]["message"]


def test_answers_forbid_foreign_scripts_and_framing(api: TestClient) -> None:
    for path in ("/", "/health", "/v2/nothing"):
        headers = api.get(path).headers
        assert (
            "default-src 'none'" in headers["content-security-policy"]
            and headers["x-content-type-options"] == "nosniff"
        )
        assert "access-control-allow-origin" not in headers


def test_a_class_of_a_long_name_is_found_by_it() -> None:
    """The prompt was shortened, for messages, before it was looked up."""
    name = "x" * 250
    pipe = Pipeline(random_model(tiny_config(class_names=("cat", name, "dog"))), PixelTokenizer(factor=1))
    assert _class_id(name, pipe) == 1


def test_seed_minus_one_is_a_random_one_that_is_told(api: TestClient) -> None:
    """As with other servers; it was refused."""
    first, second = (
        api.post(GENERATE, json={"prompt": "cat", "n": 2, "seed": seed}).json()["data"] for seed in (-1, -1.0)
    )
    assert first[0]["seed"] >= 0 and first[0]["seed"] != second[0]["seed"] and first[1]["seed"] == first[0]["seed"] + 1
    again = api.post(GENERATE, json={"prompt": "cat", "n": 2, "seed": first[0]["seed"]}).json()["data"]
    assert again == first
    text = api.post(GENERATE, json={"prompt": "cat", "seed": -1, "stream": True}).text
    assert json.loads(text.split("data: ")[1])["seed"] >= 0


@pytest.mark.parametrize(
    ("floats", "integers"),
    [
        ({"n": 2.0}, {"n": 2}),
        ({"seed": 1e15}, {"seed": 10**15}),
        ({"num_inference_steps": 2.0}, {"num_inference_steps": 2}),
        ({"num_inference_steps": [1.0, 2, 3.0]}, {"num_inference_steps": [1, 2, 3]}),
        ({"candidates": 1.0, "partial_images": 0.0}, {"candidates": 1, "partial_images": 0}),
        ({"output_format": "jpeg", "output_compression": 50.0}, {"output_format": "jpeg", "output_compression": 50}),
    ],
)
def test_whole_numbers_may_be_written_as_floats(
    api: TestClient, floats: dict[str, object], integers: dict[str, object]
) -> None:
    """Clients without integers write 2 as 2.0, which is the same number in JSON; it was refused."""
    first, second = (api.post(GENERATE, json={"prompt": "cat", "seed": 5, **form}) for form in (floats, integers))
    assert first.status_code == 200 and first.json()["data"] == second.json()["data"]


@pytest.mark.parametrize("encoding", ["gzip", "Deflate", "br, gzip", "zstd"])
def test_a_compressed_body_is_415_and_told_to_be_plain(api: TestClient, encoding: str) -> None:
    """It was "an error parsing the body"."""
    body = gzip.compress(b'{"prompt": "cat"}')
    answer = api.post(GENERATE, content=body, headers={**JSON, "Content-Encoding": encoding})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (415, "unsupported_encoding")
    assert f"Content-Encoding: {encoding}" in error["message"]
    for harmless in ("identity", ""):
        headers = {**JSON, "Content-Encoding": harmless}
        assert api.post(GENERATE, content=b'{"prompt": "cat"}', headers=headers).status_code == 200
    unsaid = api.post(GENERATE, content=body, headers=JSON)
    assert unsaid.status_code == 400 and "JSON in UTF-8" in unsaid.json()["error"]["message"]


def test_the_schema_tells_415_and_integers_with_their_ranges(api: TestClient) -> None:
    schema = api.get("/openapi.json").json()
    assert "415" in schema["paths"][GENERATE]["post"]["responses"]
    fields = schema["components"]["schemas"]["GenerateRequest"]["properties"]
    assert fields["seed"]["anyOf"][0] == {"type": "integer", "minimum": -1, "maximum": 2**53 - 1}
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 10}
