"""Dockerfile and Kubernetes example name what the server has: options, paths, port, user, metric, times."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Mount

from ecar.cli.options import parse
from ecar.cli.serve import KEYS_VARIABLE, ServeOptions
from ecar.serving.app import create_app
from served import make_engine

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text())}


def container(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def test_probes_and_scraping_ask_for_paths_that_exist_and_the_autoscaler_for_a_metric_that_exists(
    objects: dict[str, Any],
) -> None:
    paths = [container(objects)[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    metric = objects["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    with TestClient(create_app(make_engine(), "tiny", keys=["k"])) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        assert [client.get(path).status_code for path in paths] == [200] * 3  # without a key
        text = client.get(annotations["prometheus.io/path"]).text
    assert re.search(rf"^{metric} \d", text, re.M)
    assert f"seriesQuery: '{metric}{{" in (ROOT / "docs/serve.md").read_text()


def test_options_port_keys_and_user_are_those_of_server_and_image(objects: dict[str, Any]) -> None:
    entry, command = (json.loads(re.search(rf"^{word} (.*)$", DOCKERFILE, re.M)[1]) for word in ("ENTRYPOINT", "CMD"))  # type: ignore[index]
    for arguments in (command, container(objects)["args"]):
        options = parse(ServeOptions, [*entry[2:], *arguments], "serve")
        options.limits.check()
        assert options.host == "0.0.0.0"
    assert {container(objects)["ports"][0]["containerPort"], ServeOptions().port} == {8000}
    assert "EXPOSE 8000" in DOCKERFILE
    assert container(objects)["env"][0]["name"] == KEYS_VARIABLE
    user = objects["Deployment"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"--uid {user}" in DOCKERFILE and f"USER {user}" in DOCKERFILE


def test_draining_ends_before_the_pod_is_killed(objects: dict[str, Any]) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    options = parse(ServeOptions, container(objects)["args"], "serve")
    before = int(container(objects)["lifecycle"]["preStop"]["exec"]["command"][1])
    # uvicorn waits three seconds more than the engine, and the engine's last stage up to ten.
    assert before + options.limits.drain_seconds + 3 + 10 <= pod["terminationGracePeriodSeconds"]


def test_objects_refer_to_each_other(objects: dict[str, Any]) -> None:
    deployment, service, scaler = (objects[kind] for kind in ("Deployment", "Service", "HorizontalPodAutoscaler"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert service["spec"]["ports"][0]["targetPort"] == container(objects)["ports"][0]["name"]


def test_keys_are_asked_for_under_a_prefix_too() -> None:
    """As with Ray's --route-prefix, or mounted: there the path has the prefix in front, and no key was asked for."""
    outer = Starlette(routes=[Mount("/ecar", create_app(engine := make_engine(), "tiny", keys=["k"]))])
    engine.start()
    try:
        with TestClient(outer) as client:
            assert client.get("/ecar/v1/models").status_code == 401
            assert client.get("/ecar/v1/models", headers={"authorization": "Bearer k"}).status_code == 200
            assert client.get("/ecar/health").status_code == 200
    finally:
        engine.stop()
