"""Candidates in the server: the critic's choice is that of the pipeline, whoever the neighbours are."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from conftest import random_model, tiny_config
from ecar.pretrained.folders import save_model
from ecar.refine import BestOf, Critic
from ecar.sampling.pipeline import Pipeline
from ecar.serving.app import create_app
from ecar.serving.config import Limits
from ecar.serving.engine import Engine, own_critic
from ecar.serving.metrics import Metrics
from ecar.tokenizers import PixelTokenizer

GENERATE = "/v1/images/generations"


class MeanColour(torch.nn.Module):
    """Features that need no package."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def pipeline() -> Pipeline:
    return Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))


def critic() -> Critic:
    weights = {
        "weight": torch.tensor([[9.0, 0, 0], [0, -9.0, 0], [0, 0, 9.0], [1.0, 1, 1]]),
        "bias": torch.zeros(4),
        "quantiles": torch.linspace(-2000, 2000, 64).expand(4, 64).clone(),
    }
    about = {"power": 2.0, "settings": json.loads(json.dumps(pipeline().settings().to_json()))}
    return Critic(MeanColour(), weights, about)  # type: ignore[arg-type]


@contextmanager
def serving(
    pipe: Pipeline, limits: Limits | None = None, load_critic: Callable[[], Critic | None] = critic
) -> Iterator[TestClient]:
    engine = Engine(lambda: pipe, limits or Limits(), Metrics(), load_critic)
    with TestClient(create_app(engine, "tiny"), raise_server_exceptions=False) as client:
        while client.get("/ready").status_code != 200:
            pass
        yield client


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.int16)


def test_images_and_choices_are_those_of_the_pipeline_whatever_the_neighbours() -> None:
    pipe = pipeline()
    orders: list[dict[str, Any]] = [
        {"prompt": "dog", "n": 3, "seed": 5, "candidates": 3},
        {"prompt": "cat", "n": 2, "seed": 9, "candidates": 4},
        {"prompt": "cat", "n": 2, "seed": 0},
        {"prompt": "cat", "n": 2, "seed": 40, "candidates": 1},
    ]
    with serving(pipe, Limits(max_batch=5, gather_ms=200)) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda order: client.post(GENERATE, json=order).json(), orders))
    moved = 0
    for order, answer in zip(orders, answers, strict=True):
        n, seeds = order["n"], range(order["seed"], order["seed"] + order["n"])
        best = BestOf(pipe, critic(), candidates=order.get("candidates", 1))
        ours = best([order["prompt"]] * n, seeds=seeds)
        for image, seed, chosen, data in zip(ours.images, seeds, ours.chosen, answer["data"], strict=True):
            assert np.abs(np.asarray(image, np.int16) - pixels(data["b64_json"])).max() <= 1
            assert (data["seed"], data.get("chosen_seed", seed)) == (seed, chosen)
            moved += chosen != seed
            told = json.loads(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).text["ecar"])  # type: ignore[attr-defined]
            alone = pipe([order["prompt"]], seeds=[told["seed"]]).images[0]
            assert np.abs(np.asarray(alone, np.int16) - pixels(data["b64_json"])).max() <= 1
    assert moved >= 2  # else nothing was chosen


@pytest.mark.parametrize("acceptance", [None, 0.4])
def test_candidates_of_no_class_are_chosen_too(acceptance: float | None) -> None:
    """The null class was asked for by an id that the pipeline refuses."""
    best = BestOf(pipeline(), critic(), candidates=3, acceptance=acceptance)
    out = best([None, "cat", None], seeds=[1, 2, 3], return_stages=True)
    assert out.labels == [3, 0, 3] and len(out.stages[0]) == 3
    again = pipeline()([None, "cat", None], seeds=out.chosen)
    for one, other in zip(out.images, again.images, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    unlabelled = Pipeline(random_model(tiny_config(num_classes=0, class_names=())), PixelTokenizer(factor=1))
    assert len(BestOf(unlabelled, critic(), candidates=2)(seeds=[0, 1]).images) == 2


def test_a_stream_tells_each_image_once_and_usage_counts_every_candidate() -> None:
    with serving(pipeline()) as client:
        body = {"prompt": "dog", "n": 2, "seed": 5, "candidates": 3}
        plain = client.post(GENERATE, json={**body, "candidates": 1}).json()["usage"]["output_tokens"]
        assert client.post(GENERATE, json=body).json()["usage"]["output_tokens"] == 3 * plain
        text = client.post(GENERATE, json={**body, "stream": True}).text
        metrics = client.get("/metrics").text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["image_generation.completed"] * 2
    assert sorted(event["image_index"] for event in events) == [0, 1]
    assert "ecar_images_total 6.0" in metrics and "ecar_image_seconds_count 6.0" in metrics


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"candidates": 0}, "invalid_value"),
        ({"candidates": 65}, "invalid_value"),
        ({"candidates": True}, "invalid_value"),
        ({"candidates": 9}, "too_many_candidates"),
        ({"candidates": 8, "n": 9}, "too_many_candidates"),  # no queue would ever hold them
        ({"candidates": 2, "stream": True, "partial_images": 1}, "invalid_value"),
    ],
)
def test_wrong_candidates_are_refused(change: dict[str, object], code: str) -> None:
    with serving(pipeline()) as client:
        answer = client.post(GENERATE, json={"prompt": "cat", **change})
        assert client.get("/v1/models/tiny").json()["max_candidates"] == 8
    assert (answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]) == (
        400, "candidates", code
    )  # fmt: skip


def test_a_model_without_a_usable_critic_serves_and_refuses_candidates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A critic that lacks its package would have failed the first request for candidates, in the engine's thread."""
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    for folder in (plain, broken):
        save_model(folder, pipeline().model, PixelTokenizer(factor=1))
    (broken / "critic.safetensors").write_bytes(b"nothing")
    for folder in (plain, broken):
        with serving(pipeline(), load_critic=lambda folder=folder: own_critic(str(folder))) as client:
            answer = client.post(GENERATE, json={"prompt": "cat", "candidates": 2})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_value")
            assert client.get("/v1/models/tiny").json()["max_candidates"] == 1
            assert client.post(GENERATE, json={"prompt": "cat", "candidates": 1}).status_code == 200
    assert caplog.text.count("no candidates are offered") == 1 and "critic.safetensors: not a critic" in caplog.text


def test_a_critic_that_was_asked_for_and_cannot_be_used_ends_the_start() -> None:
    def load_critic() -> Critic:
        raise ValueError("c.safetensors: no such file")

    engine = Engine(pipeline, Limits(), Metrics(), load_critic)
    with pytest.raises(ValueError, match="no such file"):
        engine.start()


def test_one_candidate_that_is_not_finite_is_one_error_for_its_request() -> None:
    pipe = pipeline()
    decode = pipe.decoder.decode

    def bad_third(latents: torch.Tensor) -> torch.Tensor:
        images = decode(latents)
        if len(images) == 3:
            images[2] = float("nan")
        return images

    with serving(pipe) as client:
        pipe.decoder.decode = bad_third  # type: ignore[method-assign]
        answer = client.post(GENERATE, json={"prompt": "cat", "candidates": 3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_finite")
        assert client.post(GENERATE, json={"prompt": "cat", "candidates": 2}).status_code == 200
