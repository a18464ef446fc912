"""Checkpoints through ``torch.distributed.checkpoint``: every process writes and reads its own slices.

In DCP's safetensors format, whose headers say where a slice belongs: its other format describes itself in a pickle. The
reader takes plain safetensors files too, so that any checkpoint loads into any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ecar.training.engine.checkpoint import commit, prepare, restore_optimizer
from ecar.training.engine.ema import EMA
from ecar.training.engine.stored import empty, stored

Group = Any  # a process group of gloo of its own: training uses the default one at the same time


def save_sharded(
    run: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any], group: Group, *, background: bool
) -> Callable[[], None]:
    """Write ``run/checkpoints/step_N`` from all processes of ``group``.

    Args:
        background: return as soon as the tensors are copied.

    Returns:
        What has to be called, on any thread, to finish: it waits, and rank 0 renames the folder.

    Raises:
        OSError: it cannot be written, on every rank; so does what is returned.
    """
    answer: list[str | OSError] = [""]
    if dist.get_rank() == 0:
        try:
            answer = [str(prepare(run, step))]
        except OSError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0, group=group)
    if isinstance(answer[0], OSError):
        raise answer[0]
    folder = Path(answer[0])
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    future = None
    if background:
        future = async_save(tensors, storage_writer=writer, process_group=group)
    else:
        _as_os_error(lambda: save(tensors, storage_writer=writer, process_group=group))

    def finish() -> None:
        if future is not None:
            _as_os_error(future.result)  # type: ignore[union-attr]
        if dist.get_rank() == 0:
            commit(folder, step, record)

    return finish


def restore_sharded(folder: Path, module: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]) -> None:
    """Fill sharded weights, averages and optimizers from a checkpoint of any number of processes, in place."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {f"model.{n}": t for n, t in module.state_dict().items()} | ema.tensors()
    parameters = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    for name, entry in stored(reader).items():
        if name.startswith("optimizer."):
            _, which, index, _ = name.split(".", 3)
            parameter = parameters[int(which)][int(index)]
            like = parameter.shape == entry.size and parameter.ndim  # else a counter
            tensors[name] = torch.zeros_like(parameter).detach() if like else empty(entry)
    load(tensors, storage_reader=reader)
    for j, optimizer in enumerate(optimizers):
        restore_optimizer(tensors, j, optimizer)


def _as_os_error(work: Callable[[], Any]) -> None:
    """DCP reports what any rank could not do on every rank, as a BaseException; faults of disks as what they are."""
    try:
        work()
    except CheckpointException as error:
        causes = [wrapped[0] for wrapped in error.failures.values()]
        message = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
        raise (OSError if all(isinstance(c, OSError) for c in causes) else RuntimeError)(message) from error
