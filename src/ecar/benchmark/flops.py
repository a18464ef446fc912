"""FLOPs of sampling, counted by ``torch.utils.flop_counter`` while one image is made (2 per multiply-accumulate)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from ecar.config import SamplingConfig
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.sampling.pipeline import Pipeline


def sampling_flops(pipe: Pipeline, settings: SamplingConfig) -> dict[str, int]:
    """FLOPs per image: ``model`` (transformer, head, guidance), ``decoder``, ``total``.

    Matrix products and convolutions; element-wise work is not counted.
    """
    model = pipe.model
    labels = torch.zeros(1, dtype=torch.int64, device=model.device)
    noise = draw_noise([0], model.plan, model.config.channels)
    with FlopCounterMode(display=False) as counter:
        latents = sample_latents(model, labels, noise, settings)
    sampling = int(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.tokenizer.decode(latents)
    decoder = int(counter.get_total_flops())
    return {"model": sampling, "decoder": decoder, "total": sampling + decoder}
