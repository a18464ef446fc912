"""FLOPs of sampling, counted by ``torch.utils.flop_counter`` while one image is made (2 per multiply-accumulate)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ecar.config import SamplingConfig
from ecar.refine.critic import Critic
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import StageNoise, draw_noise
from ecar.sampling.pipeline import Pipeline


def flop_counter() -> FlopCounterMode:
    """torch's counter, with the attention kernel of the CPU, which its own table lacks."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        del args, out_shape, kwargs
        return sdpa_flop_count(query, key, value)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})


def flops_of(call: Callable[[], object]) -> int:
    """FLOPs of a call."""
    with flop_counter() as counter:
        call()
    return int(counter.get_total_flops())


def sampling_flops(
    pipe: Pipeline, settings: SamplingConfig, candidates: float = 1, critic: Critic | None = None
) -> dict[str, int]:
    """FLOPs per image: ``model`` (trunk, head, guidance), ``decoder``, ``total``; with a critic those of all
    ``candidates`` of an image (a mean, with acceptance), and of the ``critic``.

    Matrix products and convolutions; element-wise work is not counted.
    """
    flops = count_flops(pipe, lambda labels, noise: sample_latents(pipe.model, labels, noise, settings))
    if critic is None:
        return flops
    image = torch.zeros(1, 3, *pipe.model.config.image_side, dtype=torch.uint8)
    judged = flops_of(lambda: critic(image, torch.zeros(1, dtype=torch.int64)))
    parts = {"model": flops["model"], "decoder": flops["decoder"], "critic": judged}
    parts = {name: round(candidates * count) for name, count in parts.items()}
    return parts | {"total": sum(parts.values())}


@torch.no_grad()
def count_flops(pipe: Pipeline, draw: Callable[[Tensor, list[StageNoise]], Tensor]) -> dict[str, int]:
    """``sampling_flops`` of latents drawn by ``draw`` from labels and noise of one image."""
    model = pipe.model
    labels = torch.zeros(1, dtype=torch.int64, device=model.device)
    noise = draw_noise([0], model.plan, model.config.channels)
    with flop_counter() as counter:
        latents = draw(labels, noise)
    sampling = int(counter.get_total_flops())
    decoder = flops_of(lambda: pipe.decoder.decode(latents))
    return {"model": sampling, "decoder": decoder, "total": sampling + decoder}
