"""Closed formulas = the flop counter: of sampling exactly, of training within 1%."""

from __future__ import annotations

import pytest
import torch

from conftest import random_model, tiny_config
from ecar.config import ModelConfig, SamplingConfig, StageConfig
from ecar.cost.flops import flop_counter
from ecar.cost.formulas import sampling_flops, training_flops
from ecar.pretrained.build import build_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.training.loss import Draws, stage_losses


def dit_config(patch: int) -> ModelConfig:
    return tiny_config(
        kind="dit", patch=patch, stages=StageConfig(sides=((8, 8),), ends=(1.0,)), velocity_std=(), trunk_depth=0,
        width=32, context_noise=0.0, sampling=None,
    )  # fmt: skip


CASES = [
    (tiny_config(), SamplingConfig(steps=(3, 2, 2), guidance=(1.0, 1.0, 1.0), solver="ab2")),
    (tiny_config(), SamplingConfig(steps=(3, 2, 1), guidance=(2.0, 1.0, 1.0), solver="heun")),
    (tiny_config(width=64, heads=4), SamplingConfig(steps=(4, 1, 2), guidance=(1.0, 2.0, 1.0))),
    (tiny_config(), SamplingConfig(steps=(4, 3, 2), guidance=(2.0, 1.5, 1.0), guidance_from=(0.5, 0.3, 0.0))),
    (tiny_config(), SamplingConfig(steps=(3, 1, 2), guidance=(2.0, 1.0, 2.0), guidance_from=(0.5,) * 3, solver="heun")),
    (tiny_config(), SamplingConfig(steps=(3, 1, 1), guidance=(1.5, 1.5, 2.0), solver="heun")),
    (
        tiny_config(stages=StageConfig(sides=((4, 6), (8, 12)), ends=(0.7, 1.0)), patch=2, velocity_std=()),
        SamplingConfig(steps=(3, 2), guidance=(2.0, 1.0), solver="ab2"),
    ),
    (dit_config(1), SamplingConfig(steps=(5,), guidance=(1.0,), solver="euler")),
    (dit_config(2), SamplingConfig(steps=(3,), guidance=(2.0,), solver="heun")),
]


@pytest.mark.parametrize(("config", "settings"), CASES)
def test_sampling_formula_counts_what_the_counter_counts(config: ModelConfig, settings: SamplingConfig) -> None:
    model = build_model(config).eval()
    noise = draw_noise([0], model.plan, config.channels)
    with flop_counter() as counter:
        sample_latents(model, torch.tensor([1]), noise, settings)
    formula = sampling_flops(config, settings)
    assert sum(formula["trunk"] + formula["head"]) == counter.get_total_flops()


@pytest.mark.parametrize("share", [(1.0, 0.5, 0.25), (1.0, 1.0, 0.5)])
def test_training_formula_counts_forward_and_backward(share: tuple[float, ...]) -> None:
    model = random_model(tiny_config(width=64, heads=4)).train()
    batch, rows = 32, tuple(int(32 * s) for s in share)
    shapes = [(batch, 3, *s.side) for s in model.plan]
    draws = Draws([torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes[:-1]], torch.rand(3, batch))
    with flop_counter() as counter:
        losses = stage_losses(model, torch.randn(shapes[-1]), torch.zeros(batch, dtype=torch.int64), draws, rows)
        torch.stack([x.mean() for x in losses]).sum().backward()
    assert training_flops(model.config, share) * batch == pytest.approx(counter.get_total_flops(), rel=0.01)
