"""Training in several processes: how a batch divides, and DDP around the losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ecar.processes.world import World


def check_divides(batch_size: int, rows: tuple[int, ...], size: int, accumulate: int) -> None:
    """ValueError unless every stage's rows divide by the number of processes times that of micro-batches."""
    if any(r % (size * accumulate) for r in (batch_size, *rows)):
        parts = f"{size} processes" + (f" times --accumulate {accumulate}" if accumulate > 1 else "")
        raise ValueError(f"--batch-size {batch_size} (rows per stage {rows}) must divide by the {parts}")


@contextmanager
def no_sync(module: torch.nn.Module, last: bool) -> Iterator[None]:
    """Gradients of a micro-batch stay on their rank until the ``last`` one. Only DDP needs to be told: shards are
    reduced each time, since whole gradients are what sharding has no room for."""
    if not last and isinstance(module, torch.nn.parallel.DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def parallel(module: torch.nn.Module, world: World, *, unused: bool) -> torch.nn.Module:
    """DDP around ``module`` where there are several processes; ``unused``: some weights may get no gradient."""
    if world.size == 1:
        return module
    return torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=unused)
