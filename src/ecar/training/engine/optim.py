"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from ecar.devices import computes_bfloat16

WEIGHT_DECAY = 0.01  # of matrices; others have none
_WARMUP = 200  # steps


def make_optimizers(model: nn.Module, name: str, *, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    Args:
        model: on its device. Frozen parameters are left out.
        name: adamw or muon.
        lr: of the first step.
    """
    matrices: list[nn.Parameter] = []
    muon_matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Embeddings and modulation are not hidden matrices; "norm1." is where diffusers' DiT keeps them.
        # The two thin matrices of LoRA are factors of one: to make each orthogonal is not Muon's step.
        in_block = "blocks." in path and not any(part in path for part in ("modulation", ".norm1.", ".lora_"))
        if name == "muon" and parameter.ndim == 2 and in_block:
            muon_matrices.append(parameter)
        else:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused, foreach=not fused)
    ]
    if muon_matrices:
        optimizers.append(BatchedMuon(muon_matrices, lr=lr, weight_decay=WEIGHT_DECAY))
    return optimizers


class BatchedMuon(torch.optim.Optimizer):
    """Muon as ``torch.optim.Muon`` has it, the matrices of one shape in one batch: a fraction of the kernels, which is
    what a small model's step on a GPU waits for. Same state and numbers (up to rounding); nesterov momentum and
    ``match_rms_adamw`` only. Kernels of convolutions count as matrices (out, in * height * width)."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        coefficients = (3.4445, -4.7750, 2.0315)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95, "eps": 1e-7}
        super().__init__(matrices, {**defaults, "ns_coefficients": coefficients, "ns_steps": 5})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                grads = [m.grad for m in matrices if m.grad is not None]
                for matrix in matrices:
                    if "momentum_buffer" not in self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                buffers = [self.state[m]["momentum_buffer"] for m in matrices]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                flat = updates.flatten(2)  # (K, out, in)
                flat = orthogonal(flat, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * max(flat.shape[1:]) ** 0.5
                step = flat.to(matrices[0].dtype).view_as(updates)
                torch._foreach_add_(matrices, list(step.unbind()), alpha=-rate)


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (K, m, n) with their singular values brought near 1: Newton-Schulz steps in bfloat16 where the
    device computes it, as in ``torch.optim.Muon``."""
    a, b, c = coefficients
    x = matrices.bfloat16() if computes_bfloat16(matrices.device) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate(step: int, *, peak: float, steps: int, decay: float) -> float:
    """Rate at a step (from 1) of ``steps``: linear over 200 steps (at most a tenth of all) up to the peak, flat, then
    linear to 2% of the peak over the last ``decay`` part."""
    warm = min(1.0, step / max(1, min(_WARMUP, steps // 10)))
    left = (steps - step) / max(1, round(decay * steps))
    return peak * warm * (0.02 + 0.98 * min(1.0, left))
