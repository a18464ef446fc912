"""What a model needs, before it exists: parameters, memory, FLOPs. Nothing is allocated (fake tensors)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ecar.config import ModelConfig, SamplingConfig
from ecar.cost.formulas import sampling_flops, training_flops
from ecar.cost.memory import sampling_memory
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.training.loss import Draws, stage_losses


def saved_bytes(model: StageModel, batch: int, share: Sequence[float], *, bf16: bool) -> int:
    """Bytes that the loss keeps for its backward pass, parameters not counted: run under a fake mode for an estimate,
    or without for a measurement."""
    config, plan = model.config, model.plan
    shapes = [(batch, config.channels, *stage.side) for stage in plan]
    draws = Draws([torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes[:-1]], torch.rand(len(plan), batch))
    labels, rows = torch.zeros(batch, dtype=torch.int64), tuple(max(1, round(s * batch)) for s in share)
    kept: dict[int, tuple[int, object]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return x

    with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = stage_losses(model, torch.randn(shapes[-1]), labels, draws, rows)
        torch.stack([loss.mean() for loss in losses]).sum()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(size for address, (size, _) in kept.items() if address not in own)


def estimate(
    config: ModelConfig, settings: SamplingConfig, *, batch: int, share: Sequence[float], bf16: bool
) -> dict[str, Any]:
    """Parameters, training memory for ``batch`` images on one device, FLOPs of sampling and training.

    Memory counts float32 weights, gradients, AdamW's two moments, the weight average, and what the loss saves for the
    backward pass; explicit attention (this CPU path) saves its scores, fused attention on a GPU does not. Of sampling,
    for one image and for sixteen: see ``sampling_memory``.
    """
    with FakeTensorMode():
        fake = build_model(config)
        activations = saved_bytes(fake, batch, share, bf16=bf16)
    parts = {"trunk": fake.trunk, "head": fake.head}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    sampling, total = sampling_flops(config, settings), fake.num_parameters()
    model = sum(sampling["trunk"] + sampling["head"])
    return {
        "parameters": {**parameters, "total": total},
        "training_memory_bytes": {
            "weights": 4 * total,
            "gradients": 4 * total,
            "optimizer (AdamW)": 8 * total,
            "weight average": 4 * total,
            "saved for backward": activations,
            "total": 20 * total + activations,
        },
        "sampling_memory_bytes": sampling_memory(config, settings, (1, 16), torch.bfloat16 if bf16 else torch.float32),
        "sampling_flops_per_image": {**sampling, "total": model},
        "sampling_multiply_accumulates_per_image": model // 2,
        "training_flops_per_image": training_flops(config, share),
    }
