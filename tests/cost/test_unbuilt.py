"""FLOPs without weights = those of a model that is built."""

from __future__ import annotations

import pytest
import torch

from conftest import random_model, tiny_config
from ecar.config import ModelConfig, SamplingConfig, StageConfig
from ecar.cost.flops import flops_of
from ecar.cost.unbuilt import batch_loss, sampling_flops, training_flops
from ecar.pretrained.build import build_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise


def dit_config(patch: int) -> ModelConfig:
    return tiny_config(
        kind="dit", patch=patch, stages=StageConfig(sides=((8, 8),), ends=(1.0,)), velocity_std=(), trunk_depth=0,
        width=32, context_noise=0.0, sampling=None,
    )  # fmt: skip


CASES = [
    (tiny_config(), SamplingConfig(steps=(3, 2, 1), guidance=(2.0, 1.0, 1.0), solver="heun")),
    (dit_config(1), SamplingConfig(steps=(7,), guidance=(1.0,), solver="euler")),
    (dit_config(2), SamplingConfig(steps=(5,), guidance=(2.0,), solver="heun")),
    (dit_config(2), SamplingConfig(steps=(6,), guidance=(2.0,), guidance_from=(0.5,))),
]


@pytest.mark.parametrize(("config", "settings"), CASES)
def test_flops_of_sampling_are_those_of_a_built_model(config: ModelConfig, settings: SamplingConfig) -> None:
    """Of DiT only a few steps are counted: it is as if all were."""
    model = build_model(config).eval()
    noise = draw_noise([0], model.plan, config.channels)
    real = flops_of(lambda: sample_latents(model, torch.tensor([1]), noise, settings))
    assert sampling_flops(config, settings) == real


@pytest.mark.parametrize("share", [(1.0, 0.5, 0.25), (1.0, 1.0, 0.5)])
def test_flops_of_training_are_those_of_a_built_model(share: tuple[float, ...]) -> None:
    model = random_model(tiny_config(width=64, heads=4)).train()
    real = flops_of(lambda: batch_loss(model, 32, share).backward())
    assert training_flops(model.config, share) * 32 == pytest.approx(real, rel=0.01)
