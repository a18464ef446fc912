"""FLOPs of a model that does not exist yet (2 per multiply-accumulate): it samples and trains on fake tensors, and
torch's counter looks on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ecar.config import ModelConfig, SamplingConfig
from ecar.cost.flops import flops_of
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import StageNoise
from ecar.training.loss import Draws, stage_losses

_BATCH = 256  # images of a training step: what all of them share hardly counts


@cache
def sampling_flops(config: ModelConfig, settings: SamplingConfig) -> int:
    """One image, guidance counted; the decoder is not in it."""
    with FakeTensorMode():
        model = build_model(config).eval()

        def count(settings: SamplingConfig) -> int:
            return flops_of(lambda: sample_fakes(model, settings, 1))

        steps = settings.steps[0]
        if config.has_trunk or settings.guidance_from or steps <= 3:
            return count(settings)
        # From the second on, every step of DiT costs the same: of hundreds, few are counted.
        two, three = (count(replace(settings, steps=(n,))) for n in (2, 3))
        return two + (steps - 2) * (three - two)


@cache
def training_flops(config: ModelConfig, share: tuple[float, ...]) -> int:
    """One image of a large batch, forward and backward; stage k trains on ``share[k]`` of the images."""
    with FakeTensorMode():
        model = build_model(config)
        return flops_of(lambda: batch_loss(model, _BATCH, share).backward()) // _BATCH


def sample_fakes(model: StageModel, settings: SamplingConfig, batch: int) -> None:
    """Sample ``batch`` images, under a fake mode."""
    maps = [torch.empty(batch, model.config.channels, *stage.side) for stage in model.plan]
    noise = [StageNoise(x, before) for x, before in zip(maps, [None, *maps[:-1]], strict=True)]
    sample_latents(model, torch.zeros(batch, dtype=torch.int64), noise, settings)


def batch_loss(model: StageModel, batch: int, share: Sequence[float]) -> Tensor:
    """Loss of a batch of random latents, of which stage k trains on ``share[k]``."""
    shapes = [(batch, model.config.channels, *stage.side) for stage in model.plan]
    times = torch.rand(len(model.plan), batch)
    draws = Draws([torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes[:-1]], times)
    labels, rows = torch.zeros(batch, dtype=torch.int64), tuple(max(1, round(s * batch)) for s in share)
    losses = stage_losses(model, torch.randn(shapes[-1]), labels, draws, rows)
    return torch.stack([loss.mean() for loss in losses]).sum()
