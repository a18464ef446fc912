"""Estimates without weights = what small models really take."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import random_model, tiny_config
from ecar.cli.main import main
from ecar.config import SamplingConfig
from ecar.cost.estimate import estimate, saved_bytes
from ecar.cost.memory import LiveBytes, sampling_memory
from ecar.network.presets import preset_config
from ecar.pretrained.build import build_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise


def test_parameters_are_those_of_the_built_model() -> None:
    config = tiny_config(width=64, heads=4)
    settings = SamplingConfig(steps=(1, 1, 1), guidance=(1.0, 1.0, 1.0))
    parameters = estimate(config, settings, batch=2, share=(1.0, 0.5, 0.5), bf16=False)["parameters"]
    assert isinstance(parameters, dict)
    assert parameters["total"] == random_model(config).num_parameters()


@pytest.mark.parametrize("bf16", [False, True])
def test_saved_memory_is_what_a_real_step_saves(bf16: bool) -> None:
    config, share = tiny_config(width=64, heads=4), (1.0, 0.5, 0.5)
    real = saved_bytes(random_model(config), 8, share, bf16=bf16)
    settings = SamplingConfig(steps=(1, 1, 1), guidance=(1.0, 1.0, 1.0))
    memory = estimate(config, settings, batch=8, share=share, bf16=bf16)["training_memory_bytes"]
    assert isinstance(memory, dict)
    assert memory["saved for backward"] == pytest.approx(real, rel=0.02)


def test_live_bytes_are_those_of_what_is_alive_and_views_are_free() -> None:
    x = torch.zeros(1000)
    with LiveBytes() as live:
        y = x + 1
        z = (y * 2).view(10, 100)
        del y
        total = z.sum() + x[:5].sum()
        assert live.now == 4000 + 4 and live.peak == 8000
        del z
        assert live.now == 4
    assert float(total) == 2000


@pytest.mark.parametrize("kind", ["ecar", "dit"])
def test_memory_of_sampling_is_what_a_real_run_holds(kind: str) -> None:
    """Two ways: fake tensors, and the same count over real ones; guidance and rows cost what they hold."""
    stages, sizes = (2 if kind == "ecar" else 1), {"latent": (8, 8), "classes": 10, "channels": 4, "image": (32, 32)}
    config = preset_config("dit-nano" if kind == "dit" else "nano", stages=stages, **sizes)
    settings = SamplingConfig(steps=(3, 2)[:stages], guidance=(1.5, 1.0)[:stages], solver="ab2")
    model = build_model(config).eval()
    with LiveBytes() as live:
        sample_latents(model, torch.zeros(4, dtype=torch.int64), draw_noise([0, 1, 2, 3], model.plan, 4), settings)
    one, four = sampling_memory(config, settings, (1, 4), torch.float32).values()
    assert four["weights"] == one["weights"] == 4 * model.num_parameters()
    assert four["cache and activations"] == pytest.approx(live.peak, rel=0.02)
    assert 3.5 < four["cache and activations"] / one["cache and activations"] < 4.5


def test_xl_fits_in_a_test_because_nothing_is_allocated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--preset", "xl", "--guidance", "--batch-size", "4"]) == 0
    ecar = json.loads(capsys.readouterr().out.splitlines()[-1])
    dit = ["estimate", "--preset", "dit-xl/2", "--factor", "8", "--channels", "4"]
    assert main([*dit, "--batch-size", "4", "--guidance"]) == 0
    peer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert peer["sampling_flops_per_image"]["total"] == pytest.approx(250 * 2 * 2 * 118.6e9, rel=0.02)  # 2212.09748
    assert ecar["sampling_flops_per_image"]["total"] < peer["sampling_flops_per_image"]["total"] / 50
    assert main(["estimate", "--preset", "nano", "--resolution", "32", "--factor", "4", "--stages", "1"]) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert one["sampling"]["steps"] == [8]  # a single stage took DiT's 250


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--preset", "huge"], "preset"),
        (["--resolution", "250"], "divide"),
        (["--steps", "1,2"], "steps"),
        (["--tflops", "0"], "positive"),
        (["--tflops", "inf"], "positive"),
        (["--epochs", "nan"], "positive"),
        (["--devices", "0"], "--devices must be a positive number"),
        (["--preset", "unet/2"], "--preset 'unet/2': there is no such model"),
    ],
)
def test_wrong_input_exits_with_2(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_estimate_takes_the_shares_that_training_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """It counted half of the images in the finer stages, whatever was asked for."""
    words = ["estimate", "--preset", "nano", "--resolution", "32", "--factor", "4", "--stages", "2"]
    costs = []
    for share in (["--stage-share", "1", "0.5"], []):
        assert main([*words, *share]) == 0
        costs.append(json.loads(capsys.readouterr().out.splitlines()[-1])["training_flops_per_image"])
    assert costs[0] < 0.8 * costs[1]
    assert main([*words, "--stage-share", "0", "1"]) == 0
    assert main([*words, "--stage-share", "0.5", "1"]) == 2
