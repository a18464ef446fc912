"""Edits as the official client sends them: the pictures of ``Pipeline.edit``, streams, shared batches, wrong input."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from conftest import begins, random_model, tiny_config
from ecar.sampling.edit import redrawn
from ecar.sampling.pipeline import Pipeline
from ecar.serving.app import create_app
from ecar.serving.engine import Engine
from ecar.serving.previews import drawn_points
from ecar.serving.rows import Event, Finished, Redraw, Row
from ecar.stages import make_plan
from ecar.tokenizers import PixelTokenizer
from served import listening, make_engine

PIPE = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
EDITS = "/v1/images/edits"
SIZE = (36, 24)  # three times the model's


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(PIPE)


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with listening(create_app(engine, "tiny", cors_origins=("https://app.example.com",)), engine) as port:
        while engine.state != "ready":
            pass
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def api(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def a_picture(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)


def a_mask(size: tuple[int, int] = SIZE) -> Image.Image:
    """The left half is transparent."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shown(image: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json)))).astype(int)


def assert_same(images: list[Any], wanted: list[Image.Image]) -> None:
    """But for float rounding: neighbours in a batch change a value by at most 1 of 255."""
    assert len(images) == len(wanted)
    for image, other in zip(images, wanted, strict=True):
        assert np.abs(shown(image) - np.asarray(other).astype(int)).max() <= 1


@pytest.mark.parametrize("strength", [None, 0.6])
def test_an_edit_with_a_mask_is_that_of_the_pipeline(api: openai.OpenAI, strength: float | None) -> None:
    extra = {"seed": 5} if strength is None else {"seed": 5, "strength": strength}
    answer = api.images.edit(
        image=png(a_picture()), mask=png(a_mask()), prompt="dog", n=3, size="12x8", user="u", extra_body=extra
    )  # type: ignore[call-overload]
    wanted = PIPE.edit(a_picture(), mask=a_mask(), label="dog", seeds=[5, 6, 7], strength=strength or 1.0)
    assert_same(answer.data, wanted.images)
    assert [image.seed for image in answer.data] == [5, 6, 7]
    kept = np.asarray(a_picture().resize((12, 8), Image.Resampling.BICUBIC))[:, 6:]
    assert all((shown(image)[:, 6:] == kept).all() for image in answer.data)
    assert answer.usage.input_tokens_details.image_tokens == 8 * 12 and answer.usage.input_tokens == 1 + 8 * 12


def test_without_a_mask_half_of_the_way_is_drawn(api: openai.OpenAI) -> None:
    """No client sends a strength, and at strength 1 nothing of the picture would be left."""
    answer = api.images.edit(
        image=[png(a_picture())], prompt="cat", extra_body={"seed": 3, "guidance_scale": [2, 1, 1]}
    )
    settings = PIPE.settings(guidance=[2, 1, 1])
    assert_same(answer.data, PIPE.edit(a_picture(), label="cat", strength=0.5, seeds=[3], settings=settings).images)
    record = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).text  # type: ignore[attr-defined]
    assert '"strength": 0.5' in record["ecar"] and '"class": "cat"' in record["ecar"]


def test_variations_are_those_of_the_pipeline(api: openai.OpenAI) -> None:
    answer = api.images.create_variation(image=png(a_picture()), n=2, extra_body={"seed": 8})
    assert_same(answer.data, PIPE.vary(a_picture(), seeds=[8, 9]).images)
    other = api.images.create_variation(image=png(a_picture()), extra_body={"seed": 8, "prompt": "1", "strength": 0.9})
    assert_same(other.data, PIPE.vary(a_picture(), label="dog", seeds=[8], strength=0.9).images)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF"])
def test_formats_are_told_by_their_content(api: openai.OpenAI, form: str) -> None:
    buffer = io.BytesIO()
    a_picture().save(buffer, form)
    image = ("picture.png", buffer.getvalue(), "image/png")
    answer = api.images.edit(image=image, prompt="dog", output_format="webp", extra_body={"seed": 1})
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == "WEBP"


@pytest.mark.parametrize(("mask", "strength"), [(True, 1.0), (False, 0.5), (True, 0.9)])
def test_a_streamed_edit_shows_three_previews_with_the_kept_pixels(
    api: openai.OpenAI, mask: bool, strength: float
) -> None:
    files = {"mask": png(a_mask())} if mask else {}
    extra = {"seed": 4, "strength": strength, "num_inference_steps": 8}
    stream = api.images.edit(
        image=png(a_picture()), prompt="dog", stream=True, partial_images=3, extra_body=extra, **files
    )  # type: ignore[call-overload]
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image"] * 3 + ["image_edit.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert events[-1].usage.total_tokens == 1 + 96 + sum(stage.tokens for stage in PIPE.model.plan)
    settings = PIPE.settings(steps=8)
    wanted = PIPE.edit(
        a_picture(), mask=a_mask() if mask else None, label="dog", seeds=[4], strength=strength, settings=settings
    )
    assert_same(events[-1:], wanted.images)
    if mask:
        assert all((shown(event)[:, 6:] == shown(events[-1])[:, 6:]).all() for event in events)
    assert len({event.b64_json for event in events}) == 4


def test_previews_lie_among_the_steps_that_an_edit_draws() -> None:
    plan = make_plan(tiny_config().stages)
    for strength in (0.05, 0.2, 0.5, 0.8, 1.0):
        begin = begins(plan, strength)
        points = drawn_points((8, 8, 8), begin, 3)
        assert list(points) == sorted(set(points)) and points
        assert all(8 * begin[stage] < step <= 8 for stage, step in points)
        assert (2, 8) not in points
    assert drawn_points((8, 8, 8), (0.0, 0.0, 0.0), 2) == ((0, 8), (1, 8))
    assert drawn_points((8, 8, 8), begins(plan, 5e-324), 3) == ()


def test_a_strength_of_nearly_nothing_gives_the_picture_back(api: openai.OpenAI) -> None:
    """The request was never answered."""
    stream = api.images.edit(**GOOD, stream=True, partial_images=3, extra_body={"strength": 5e-324})
    (event,) = list(stream)
    assert_same([event], PIPE.edit(a_picture(), label="dog", strength=5e-324).images)


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_edits_and_generations_share_batches_and_do_not_notice(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fixed_shapes: bool
) -> None:
    """The engine of the server, asked directly: so all rows come at the same moment. Of fixed shapes, with two more."""
    monkeypatch.setattr(PIPE, "fixed_shapes", fixed_shapes)
    settings = PIPE.settings()
    done, events = threading.Event(), dict[int, Event]()

    def row(number: int, redraw: Redraw | None) -> Row:
        def emit(event: Event) -> None:
            events[number] = event
            if len(events) == 6:
                done.set()

        return Row(1, number, settings, emit, redraw=redraw)

    half = Redraw(redrawn(a_picture(), (8, 12), a_mask(), 1.0), 1.0)
    part = Redraw(redrawn(a_picture(1), (8, 12), None, 0.3), 0.3)
    before = engine.metrics.registry.get_sample_value("ecar_batch_size_sum", {"stage": "1"}) or 0
    count = engine.metrics.registry.get_sample_value("ecar_batch_size_count", {"stage": "1"}) or 0
    engine.submit([row(i, redraw) for i, redraw in enumerate([None, half, part, None, half, None])])
    assert done.wait(60)
    assert engine.metrics.registry.get_sample_value("ecar_batch_size_sum", {"stage": "1"}) == before + 6
    assert engine.metrics.registry.get_sample_value("ecar_batch_size_count", {"stage": "1"}) == count + 1
    monkeypatch.undo()
    alone = PIPE(labels=["dog"] * 3, seeds=[0, 3, 5]).images
    wanted = {0: alone[0], 3: alone[1], 5: alone[2]}
    wanted |= {i: PIPE.edit(a_picture(), mask=a_mask(), label="dog", seeds=[i]).images[0] for i in (1, 4)}
    wanted[2] = PIPE.edit(a_picture(1), label="dog", strength=0.3, seeds=[2]).images[0]
    for number, image in wanted.items():
        event = events[number]
        assert isinstance(event, Finished)
        assert np.abs(np.asarray(event.image).astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_a_picture_is_encoded_once_for_all_images_of_a_request(
    api: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, threads = PIPE.tokenizer.encode, list[str]()

    def counted(images: Any) -> Any:
        threads.append(threading.current_thread().name)
        return encode(images)

    monkeypatch.setattr(PIPE.tokenizer, "encode", counted)
    api.images.edit(image=png(a_picture()), mask=png(a_mask()), prompt="dog", n=10)
    assert threads == ["ecar-engine"]


def test_a_picture_that_the_tokenizer_refuses_fails_alone(
    api: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine failed with it, for all, and five of them in a row would have ended it."""

    def refuse(_: Any) -> None:
        raise ValueError("the images are coloured, and the tokenizer is for grey ones")

    monkeypatch.setattr(PIPE.tokenizer, "check_images", refuse)
    with pytest.raises(openai.BadRequestError, match="coloured") as caught:
        api.images.edit(**GOOD, n=2)
    assert caught.value.code == "invalid_image"
    with pytest.raises(openai.APIError, match="coloured"):
        list(api.images.edit(**GOOD, stream=True))
    assert api.images.generate(prompt="dog").data and engine.state == "ready"
    assert engine.metrics.registry.get_sample_value("ecar_engine_restarts_total") == 0


def bomb() -> bytes:
    """A PNG of 100 megapixels in 12 kilobytes."""
    return png(Image.new("1", (10_000, 10_000)))


GOOD = {"image": png(a_picture()), "prompt": "dog"}
WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"image": ("notes.png", b"not a picture", "image/png")}, "image", "invalid_image", "content"),
    ({"image": b""}, "image", "invalid_image", "content"),
    ({"image": []}, "image", "missing_required_parameter", "give a picture"),
    ({"image": png(a_picture())[:400]}, "image", "invalid_image", "decoded"),
    ({"image": bomb()}, "image", "invalid_image", "10000x10000 pixels"),
    ({"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, "image", "invalid_image", "content"),
    ({"image": [png(a_picture())] * 2}, "image", "invalid_value", "one picture at a time"),
    ({"mask": png(a_mask((12, 8)))}, "mask", "invalid_value", "12x8 pixels and the picture 36x24"),
    ({"mask": png(Image.new("RGB", SIZE))}, "mask", "invalid_value", "empty"),
    ({"mask": b"text"}, "mask", "invalid_image", "content"),
    ({"mask": bomb()}, "mask", "invalid_image", "pixels"),
    ({"mask": png(Image.new("L", SIZE, 255))}, "mask", "invalid_value", "nothing of the picture"),
    ({"prompt": "dgo"}, "prompt", "unknown_class", "dog"),
    ({"prompt": ""}, "prompt", "invalid_value", "1 character"),
    ({"extra_body": {"strength": 0}}, "strength", "invalid_value", "greater than 0"),
    ({"extra_body": {"strength": 1.5}}, "strength", "invalid_value", "less than or equal to 1"),
    ({"extra_body": {"strength": "nan"}}, "strength", "invalid_value", "strength"),
    ({"extra_body": {"strength": 1}}, "strength", "invalid_value", "nothing of the picture"),
    ({"extra_body": {"seed": "x"}}, "seed", "invalid_value", "integer"),
    ({"extra_body": {"candidates": 2}}, "candidates", "unsupported_value", "no critic"),
    ({"extra_body": {"color": "red"}}, "color", "unknown_parameter", "color"),
    ({"markup": png(a_picture())}, "markup", "unknown_parameter", "no file"),
    ({"size": "1024x1024"}, "size", "unsupported_size", "12x8"),
    ({"n": 11}, "n", "invalid_value", "10"),
    ({"partial_images": 2}, "partial_images", "invalid_value", "stream"),
    ({"response_format": "url"}, "response_format", "unsupported_value", "b64_json"),
]


@pytest.mark.parametrize(("change", "param", "code", "words"), WRONG)
def test_wrong_edits_are_the_exceptions_that_clients_catch(
    api: openai.OpenAI, change: dict[str, Any], param: str, code: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.edit(**{**GOOD, **change})
    assert (caught.value.param, caught.value.code) == (param, code) and words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_picture_of_100_megapixels_is_refused_before_it_is_decoded(
    api: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 12 kilobytes would become 100 megabytes and more, for every such request at once."""
    decoded: list[tuple[int, int]] = []
    load = PngImageFile.load

    def counted(self: PngImageFile) -> Any:
        decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", counted)
    for wrong in ({"image": bomb()}, {"mask": bomb()}):
        with pytest.raises(openai.BadRequestError, match="pixels"):
            api.images.edit(**{**GOOD, **wrong})
    with pytest.raises(openai.BadRequestError, match="pixels"):
        api.images.create_variation(image=bomb())
    assert (10_000, 10_000) not in decoded
    api.images.edit(**GOOD)
    assert SIZE in decoded  # it counts


def test_an_edit_with_another_model_or_without_a_picture_is_told_so(api: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        api.images.edit(**GOOD, model="dall-e-2")
    for data, files in (({"prompt": "dog"}, {"mask": png(a_mask())}), ({"prompt": "dog", "image": "x"}, {"x": b""})):
        error = httpx.post(f"{url}{EDITS}", data=data, files=files).json()["error"]
        assert error["param"] == "image" and error["type"] == "invalid_request_error"
    files = {"image": png(a_picture()), "mask": png(a_mask())}
    error = httpx.post(f"{url}/v1/images/variations", files=files).json()["error"]
    assert (error["param"], error["code"]) == ("mask", "unknown_parameter")


def test_bodies_that_are_no_form_are_refused(url: str) -> None:
    post = f"{url}{EDITS}"
    assert httpx.post(post, json={"prompt": "dog"}).status_code == 415
    assert httpx.post(post, content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 415
    kind = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\ndog\r\n'
    for body in (b"", b"nothing", part, b"--b\r\n\r\n\r\n--b--", part.replace(b"dog", b"\xff") + b"--b--", part * 65):
        answer = httpx.post(post, content=body, headers=kind)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_form", body
    twice = httpx.post(post, content=part * 2 + b"--b--\r\n", headers=kind).json()["error"]
    assert twice["param"] == "image"  # what is missing comes first
    error = httpx.post(post, data={"prompt": ["dog", "cat"]}, files={"image": png(a_picture())}).json()["error"]
    assert (error["param"], error["message"]) == ("prompt", "prompt is given more than once")


def test_an_upload_is_refused_by_its_length_before_it_is_read(url: str, engine: Engine) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST {EDITS} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        connection.sendall(f"{head}Content-Length: {engine.limits.max_upload + 1}\r\n\r\n".encode())
        answer = connection.recv(65536)
    assert b" 413 " in answer and b"100 Continue" not in answer
    big = httpx.post(f"{url}{EDITS}", data={"prompt": "dog"}, files={"image": bytes(2**21)})
    assert big.json()["error"]["code"] == "invalid_image"  # more than a body without pictures may have


def test_forms_of_other_sites_pages_are_refused(url: str) -> None:
    """A browser sends a form to another site without a preflight request."""

    def send(**headers: str) -> httpx.Response:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        files = {"image": png(a_picture())}
        return httpx.post(f"{url}{EDITS}", data={"prompt": "dog"}, files=files, headers=named)

    for origin in ("https://evil.example.com", "null", "http://["):
        refused = send(origin=origin)
        assert refused.status_code == 403 and "--cors-origin" in refused.json()["error"]["message"]
    assert [send(origin=o).status_code for o in (url, "https://app.example.com")] == [200, 200]
    # behind a proxy
    assert send(origin="https://images.example.com", sec_fetch_site="same-origin").status_code == 200
