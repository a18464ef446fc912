"""A run on many devices: figures that follow from each other, and from published ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import tiny_config
from ecar.cli.main import main
from ecar.cost.cluster import ClusterPlan, cluster


def run(share: tuple[float, ...] = (1, 1, 1), **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "devices": 8, "tflops": 1.0, "parallel": "ddp", "batch": 4, "accumulate": 1, "images": 1000, "epochs": 2,
        "storage_gbs": 1.0, "save_minutes": 30, "restart_minutes": 10,
    }  # fmt: skip
    plan = ClusterPlan(**{**values, **changes})
    return cluster(tiny_config(), plan, parameters=10**9, activations=4000, flops_per_image=10**9, share=share)


def test_time_storage_and_checkpoint_by_hand() -> None:
    found = run()
    assert found["images_per_second"] == 8000 and found["global_batch"] == 32 and found["seconds_per_update"] == 0.004
    assert found["tokens_per_second"] == 8000 * (6 + 24 + 96)
    few, name = run(share=(1, 0.5, 0.25)), "activations, blocks recomputed"
    assert few["tokens_per_second"] == 8000 * (6 + 12 + 24)  # tokens of stages that an image does not train are none
    kept = [r["memory_per_device_bytes"][name] - 4000 // 4 for r in (few, found)]
    assert kept[0] * 126 == kept[1] * 42 > 0
    assert found["latents"]["bytes"] == 1000 * 2 * 2 * 2 * 3 * 96  # flips, moments, bytes, channels, positions
    assert found["checkpoint_bytes"] == 16 * 10**9 and found["checkpoint_seconds"]["blocking"] == 16


def test_fsdp_splits_the_states_and_pays_with_traffic() -> None:
    ddp, fsdp, four = run(), run(parallel="fsdp"), run(parallel="fsdp", accumulate=4)
    name, states = "memory_per_device_bytes", "weights, gradients, optimizer, average"
    assert ddp[name][states] == 8 * fsdp[name][states] == 20 * 10**9
    assert ddp[name]["activations"] == fsdp[name]["activations"] == 4000
    traffic = [r["network_bytes_per_device_per_update"] / (4e9 * 7 / 8) for r in (ddp, fsdp, four, run(accumulate=4))]
    assert traffic == [2, 3, 12, 2]  # slices are reduced in every pass


def test_only_the_last_backward_pass_hides_the_traffic_of_whole_gradients() -> None:
    """Accumulating was said to halve the bandwidth that hides it."""
    one, two = (run(accumulate=n)["network_gbs_to_hide_it"] for n in (1, 2))
    assert one == two > 0
    slices = [run(parallel="fsdp", accumulate=n)["network_gbs_to_hide_it"] for n in (1, 2)]
    assert slices[0] == slices[1]  # twice the traffic in twice the time


def test_one_device_needs_no_network_and_the_published_run_fails_as_often_as_it_did() -> None:
    assert run(devices=1)["network_bytes_per_device_per_update"] == 0
    days = 54 * 86_400 * 16_384 * 1e12 / 1e9  # images that take 54 days there
    found = run(devices=16_384, images=round(days), epochs=1)
    assert found["days"] == 54 and found["failures"]["expected"] == pytest.approx(419)
    assert found["failures"]["seconds_lost_each"] == 60 * 25


def test_the_command_prints_it_and_refuses_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["estimate", "--preset", "nano", "--resolution", "64", "--batch-size", "2", "--devices", "8"]
    assert main([*small, "--parallel", "fsdp"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["run"]["global_batch"] == 16
    assert record["run"]["days"] * 24 == pytest.approx(record["training_hours"], abs=0.02)
    assert main([*small, "--parallel", "zero"]) == 2
    assert "ddp or fsdp" in capsys.readouterr().err
