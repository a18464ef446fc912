"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from ecar.training.config import TrainConfig


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (torch's own) for the matrices of the blocks and AdamW for the rest.

    Weight decay acts on matrices only. Frozen parameters are left out.
    """
    matrices: list[nn.Parameter] = []
    muon_matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Embeddings and modulation are not hidden matrices; "norm1." is where diffusers' DiT keeps them.
        # The two thin matrices of LoRA are factors of one: to make each orthogonal is not Muon's step.
        in_block = "blocks." in name and not any(part in name for part in ("modulation", ".norm1.", ".lora_"))
        if config.optimizer == "muon" and parameter.ndim == 2 and in_block:
            muon_matrices.append(parameter)
        else:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = config.device.startswith("cuda")
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=fused, foreach=not fused)
    ]
    if muon_matrices:
        optimizers.append(
            torch.optim.Muon(
                muon_matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate at a step (from 1): linear warm-up, flat, then linear to 2% of the peak over the last ``decay`` part."""
    warm = min(1.0, step / max(1, config.warmup))
    decay_steps = max(1, round(config.decay * config.max_steps))
    left = (config.max_steps - step) / decay_steps
    return config.lr * warm * (0.02 + 0.98 * min(1.0, left))
