"""Training in several processes: how a batch divides, DDP around the losses, and ``--parallel fsdp`` (torch's FSDP2).

With FSDP every process holds a slice of weights, gradients, optimizer state and average. The slices are ``DTensor``s;
outside this file they behave as tensors do. Checkpoints hold whole tensors, whatever the number of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ecar.processes.world import World


def check_divides(batch_size: int, rows: tuple[int, ...], size: int, accumulate: int) -> None:
    """ValueError unless every stage's rows divide by the number of processes times that of micro-batches."""
    if any(r % (size * accumulate) for r in (batch_size, *rows)):
        parts = f"{size} processes" + (f" times --accumulate {accumulate}" if accumulate > 1 else "")
        raise ValueError(f"--batch-size {batch_size} (rows per stage {rows}) must divide by the {parts}")


@contextmanager
def no_sync(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of a micro-batch stay on their rank until the ``last`` one. Only DDP needs to be told: shards are
    reduced each time, since whole gradients are what sharding has no room for."""
    if not last and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def parallel(module: nn.Module, world: World, *, unused: bool) -> nn.Module:
    """DDP around ``module`` where there are several processes; ``unused``: some weights may get no gradient."""
    if world.size == 1:
        return module
    return DistributedDataParallel(module, find_unused_parameters=unused)


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


def gathered(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Sharded tensors whole on the CPU of rank 0; the others get none, and have to ask too. One after another: the
    device has no room for all of them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if rank == 0:
            found[name] = complete.cpu()
    return found


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as ``like`` is; as it is where ``like`` is not."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class MemoryLimitError(RuntimeError):
    """The device has too little memory for the run as it was asked for."""


@contextmanager
def memory_advice(accumulate: int) -> Iterator[None]:
    """Out of memory -> one line that says what helps.

    Raises:
        MemoryLimitError: in the place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = str(error).split(". ")[0]
        raise MemoryLimitError(
            f"{what}; the same command resumes with --accumulate {2 * accumulate} (smaller parts, same result) "
            f"or, over several processes, --parallel fsdp; a new run may take a smaller --batch-size"
        ) from error
