"""A real server process and clients that know nothing of ecar: the official ``openai`` package, plain HTTP, sockets."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ecar import Pipeline
from ecar.serving.server import bind
from served import ENVIRONMENT, ServerProcess

pytest_plugins = ("served",)
Start = Callable[..., ServerProcess]
GENERATE = "/v1/images/generations"


def client(server: ServerProcess, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", **options)  # type: ignore[arg-type]


def picture(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_openai_client_lists_the_model_and_its_classes(server: ServerProcess) -> None:
    api = client(server)
    assert [model.id for model in api.models.list()] == ["fashion"]
    assert api.models.retrieve("fashion").owned_by == "ecar"
    classes = httpx.get(f"{server.url}/v1/models/fashion/classes").json()["data"]
    assert len(classes) == 10 and classes[8] == {"id": 8, "name": "Bag"}


def test_openai_client_gets_the_images_that_the_pipeline_draws(server: ServerProcess) -> None:
    answer = client(server).images.generate(
        model="fashion", prompt="ankle BOOT", n=4, extra_body={"seed": 7, "guidance_scale": 1.5}
    )
    assert answer.data is not None and answer.usage is not None and answer.usage.output_tokens == 4 * (16 + 64)
    images = Pipeline.from_pretrained("fashion")(["Ankle boot"] * 4, seeds=range(7, 11), guidance=1.5).images
    for index, (data, image) in enumerate(zip(answer.data, images, strict=True)):
        png = picture(data.b64_json)
        assert png.format == "PNG" and data.model_extra == {"seed": 7 + index}
        assert np.abs(np.asarray(png).astype(int) - np.asarray(image)).max() <= 1
        assert json.loads(png.text["ecar"])["seed"] == 7 + index  # type: ignore[attr-defined]


def test_openai_client_sees_three_partial_images_one_by_one_before_the_final_one(server: ServerProcess) -> None:
    """Steps are many, so that previews that were held back until the end would show."""
    start, arrivals, kinds, images = time.monotonic(), [], [], []
    stream = client(server).images.generate(
        prompt="Sneaker", stream=True, partial_images=3, extra_body={"seed": 2, "num_inference_steps": [64, 32]}
    )
    for event in stream:
        arrivals.append(time.monotonic() - start)
        kinds.append(event.type)
        images.append(np.asarray(picture(event.b64_json)).astype(float))
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert arrivals[0] < 0.6 * arrivals[3] and all(b > a for a, b in pairwise(arrivals))
    assert {image.shape for image in images} == {(32, 32, 3)}
    distances = [np.abs(image - images[-1]).mean() for image in images]
    assert distances[0] > distances[2] > 0, distances  # it grows towards the image


def test_small_writes_are_not_held_back_until_the_client_acknowledges_the_one_before() -> None:
    """asyncio turns Nagle's algorithm off for sockets that name their protocol only; it cost 40 ms a preview."""
    with bind("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_errors_are_the_exceptions_that_openai_users_catch(server: ServerProcess) -> None:
    api = client(server, max_retries=0)
    with pytest.raises(openai.BadRequestError) as unknown:
        api.images.generate(prompt="sneeker")
    assert (unknown.value.code, unknown.value.param) == (
        "unknown_class",
        "prompt",
    ) and "Sneaker" in unknown.value.message
    assert unknown.value.request_id is not None and unknown.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError) as missing:
        api.images.generate(prompt="Bag", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        api.images.generate(prompt="Bag", size="1024x1024")
    with pytest.raises(openai.APITimeoutError):
        client(server, timeout=0.001, max_retries=0).images.generate(prompt="Bag")


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_lossy_formats(server: ServerProcess, form: str) -> None:
    small, large = (
        httpx.post(
            f"{server.url}{GENERATE}", json={"prompt": "8", "seed": 0, "output_format": form, "output_compression": q}
        ).json()["data"][0]["b64_json"]
        for q in (5, 95)
    )
    assert picture(small).format == form.upper() and len(small) < len(large)


def test_curl_as_the_documentation_shows_it(server: ServerProcess) -> None:
    body = json.dumps({"prompt": "Dress", "n": 2})
    command = ["curl", "-sS", "--fail-with-body", f"{server.url}{GENERATE}", "-H", "Content-Type: application/json"]
    result = subprocess.run([*command, "-d", body], capture_output=True, text=True)
    assert result.returncode == 0 and len(json.loads(result.stdout)["data"]) == 2, result


def test_clients_that_vanish_mid_stream_free_the_engine(server: ServerProcess) -> None:
    def metric(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = metric('ecar_images_dropped_total{reason="cancelled"}')
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "Bag", "n": 8, "stream": True, "partial_images": 1, "num_inference_steps": [64, 64]})
    request = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(2):
        with socket.create_connection((host, int(port))) as vanishing:
            vanishing.sendall((request + body).encode())
            assert vanishing.recv(100).startswith(b"HTTP/1.1 200")
    end = time.monotonic() + 20
    while metric("ecar_images_in_progress") + metric("ecar_queue_depth ") > 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert metric('ecar_images_dropped_total{reason="cancelled"}') - before == 16


def test_overload_is_answered_429_with_retry_after_and_nothing_else(start: Start) -> None:
    server = start(["--max-queue", "10", "--max-batch", "4"])
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        body = {"prompt": "1", "n": 5}
        answers = list(pool.map(lambda _: httpx.post(f"{server.url}{GENERATE}", json=body, timeout=60), range(24)))
        statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"


def test_sigterm_finishes_accepted_requests_and_exits_with_zero(start: Start) -> None:
    server = start()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = {"prompt": "Coat", "n": 10, "num_inference_steps": [64, 64]}
        answer = pool.submit(httpx.post, f"{server.url}{GENERATE}", json=slow, timeout=60)
        while "ecar_images_in_progress 10.0" not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.01)
        server.process.terminate()
        assert len(answer.result().json()["data"]) == 10
    assert server.process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_what_cannot_be_finished_while_draining_gets_an_error_and_no_stream_just_ends(start: Start) -> None:
    """uvicorn cancelled the tasks when time was up: streams ended as if complete, requests without an answer."""
    server = start(["--drain-seconds", "1", "--max-batch", "1"])
    slow = {"prompt": "Coat", "n": 10, "num_inference_steps": [64, 64]}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stream = pool.submit(httpx.post, f"{server.url}{GENERATE}", json={**slow, "stream": True}, timeout=60)
        plain = pool.submit(httpx.post, f"{server.url}{GENERATE}", json=slow, timeout=60)
        while "ecar_images_in_progress 1.0" not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.01)
        time.sleep(0.3)
        server.process.terminate()
        event, _, data = stream.result().text.strip().split("\n\n")[-1].partition("\ndata: ")
        assert event == "event: error" and json.loads(data)["error"]["code"] == "shutting_down"
        answer = plain.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "5"
    assert server.process.wait(20) == 0


def test_slow_bodies_and_slow_images_are_given_up_and_others_are_served(start: Start) -> None:
    server = start(["--body-seconds", "1", "--deadline", "0.3"])
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        late = {"prompt": "Coat", "n": 10, "num_inference_steps": [64, 64]}
        answer = httpx.post(f"{server.url}{GENERATE}", json=late, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        slow.settimeout(10)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    with pytest.raises(openai.InternalServerError):
        client(server, max_retries=1).images.generate(prompt="Coat", n=10, extra_body={"num_inference_steps": [64, 64]})
    end = time.monotonic() + 20  # the stage that was being computed has to end first
    while httpx.post(f"{server.url}{GENERATE}", json={"prompt": "Coat", "quality": "low"}).status_code != 200:
        assert time.monotonic() < end


def test_keys_are_asked_for_compared_and_never_logged(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team a\nsecret-of-a\n\n")
    server = start(["--keys-file", file], ECAR_API_KEYS="secret-of-b, secret-of-c")
    for key in ("secret-of-a", "secret-of-b", "secret-of-c"):
        assert list(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key).models.list())
    for key in ("secret-of-d", "secret-of-", "# team a", "sécret"):
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no").images.generate(prompt="Bag")
    assert httpx.get(f"{server.url}/health").status_code == 200  # probes have no key
    assert server.stop() == 0
    assert server.log and not [line for line in (server.line, *server.log) if "secret" in line or "sécret" in line]


def test_pages_of_another_site_by_their_flag(start: Start) -> None:
    """Browsers send a preflight request without a key: it was 401."""
    site = "https://app.example.com"
    server = start(["--cors-origin", site], ECAR_API_KEYS="secret")
    asked = {"Origin": site, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert httpx.options(f"{server.url}{GENERATE}", headers=asked).headers["access-control-allow-origin"] == site
    assert httpx.head(f"{server.url}/").status_code == httpx.head(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["no-such-model"], "bundled models"),
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--keys-file", "/nowhere"], "cannot be read"),
        (["--max-queue", "1"], "--max-queue"),
        (["--max-steps", "3"], "--max-steps 3: the model itself takes 10 steps"),
        (["--deadline", "nan"], "--deadline"),
        (["--host", "256.0.0.1", "--no-auth"], "cannot listen"),
        (["--port", "99999"], "--port"),
        (["--cors-origin", "app.example.com"], "--cors-origin app.example.com: give scheme://host"),
        (["--cors-origin", "https://a.example,https://b.example/page"], "--cors-origin https://b.example/page"),
        (["--dtype", "int4"], "--dtype"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_two(arguments: list[str], word: str) -> None:
    command = [sys.executable, "-m", "ecar", "serve", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert result.returncode == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
