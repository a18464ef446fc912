"""``--parallel fsdp``: every process holds a slice of weights, gradients, optimizer state and average (torch's FSDP2).

The slices are ``DTensor``s; outside this file they behave as tensors do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(module: nn.Module, units: Iterable[nn.Module], device: str, size: int) -> None:
    """Cut the parameters of ``module`` over all ``size`` processes, in place, and move them to ``device``.

    Optimizers and averages must be made afterwards.

    Args:
        units: parts of ``module`` whose weights are whole only while they compute, inner ones first.
    """
    # Linear layers return views; nothing here writes into them, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(torch.device(device).type, (size,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a sharded tensor (the same memory); any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (every process has to ask for it); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
