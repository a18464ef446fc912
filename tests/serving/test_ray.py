"""Two replicas under Ray Serve, and the official client. Starts a Ray cluster of one machine: half a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator

import openai
import pytest

ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ecar[ray]')")
serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed (pip install 'ecar[ray]')")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ecar.cli.ray_app import build

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8471})
    serve.run(build({"model": "fashion", "replicas": "2", "threads": "1"}), name="ecar")
    yield "http://127.0.0.1:8471"
    serve.shutdown()
    ray.shutdown()


def test_official_client_streams_and_gets_our_errors_through_ray(url: str) -> None:
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    first, second = (api.images.generate(prompt="Bag", n=2, extra_body={"seed": 3}).data for _ in range(2))
    assert first is not None and second is not None
    assert [a.b64_json for a in first] == [b.b64_json for b in second]  # whichever replica drew them
    events = list(api.images.generate(prompt="Bag", stream=True, partial_images=3))
    assert [e.type.split(".")[1] for e in events] == ["partial_image"] * 3 + ["completed"]
    with pytest.raises(openai.BadRequestError) as refused:
        api.images.generate(prompt="nothing")
    assert refused.value.code == "unknown_class"


def test_wrong_arguments_are_refused() -> None:
    from ecar.cli.ray_app import build

    with pytest.raises(ValueError, match="unknown arguments modle"):
        build({"modle": "fashion"})
    for wrong in ("x", 0, "4-2", "-1"):
        with pytest.raises(ValueError, match="replicas must be"):
            build({"replicas": wrong})
    with pytest.raises(ValueError, match=r"cors_origin b\.example"):
        build({"cors_origin": "https://a.example,b.example"})
    build({"replicas": 2, "cpus": 1, "cors_origin": "*"})  # as a config file has them
