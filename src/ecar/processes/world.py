"""This process among those that torchrun started: ranks, shares of the work, agreement. One alone needs none of it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_MET: Counter[str] = Counter()  # how often this process was at a place: every time is one of its own
_NO_TIMEOUT = timedelta(days=30)  # a share of work may take longer than another by hours; stalls are the watchdog's


class RefusedByFirst(ValueError):
    """What rank 0 found wrong, on another rank: rank 0 says it, so that a user reads it once."""

    said = True


@dataclass(frozen=True)
class Part:
    """One micro-batch of one rank: every ``count``-th row of the global batch.

    So the first rows of all parts together are the first rows of the batch, and a stage that trains on a prefix trains
    on the same images however the batch is cut.

    Attributes:
        index: its first row.
        count: number of parts of the batch, over all ranks.
    """

    index: int
    count: int

    @property
    def where(self) -> slice:
        """Its rows of a global batch."""
        return slice(self.index, None, self.count)

    def rows(self, x: Tensor) -> Tensor:
        """A global batch (B, ...) -> (B / count, ...)."""
        return x[self.where]


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: 0 writes logs, checkpoints and pictures.
        size: number of processes.
        own: whether the process group was joined here, and is left here: what is called inside a longer work finds it.
    """

    rank: int = 0
    size: int = 1
    own: bool = True

    @classmethod
    def start(cls, device: str, *, tensors: bool = True) -> World:
        """Join the process group that torchrun describes in the environment; a world of one without it. Collectives
        wait longer than the watchdog does: it is to speak first, since it knows who is missing.

        Args:
            device: as resolved.
            tensors: gradients will go between the processes, on GPUs by nccl; else only words do, always by gloo.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        own = not dist.is_initialized()
        if own:
            by, timeout = ("nccl" if device.startswith("cuda") else "gloo"), timedelta(seconds=1800)
            dist.init_process_group(*((by, None, timeout) if tensors else ("gloo", None, _NO_TIMEOUT)))
        return cls(dist.get_rank(), dist.get_world_size(), own)

    def local_device(self, device: str) -> str:
        """``cuda`` -> this process's own GPU."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and self.size > 1 else device

    def parts(self, count: int) -> list[Part]:
        """This rank's ``count`` micro-batches of a global batch."""
        return [Part(self.rank + self.size * i, self.size * count) for i in range(count)]

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This rank's part of ``work``: neighbours, since what lies together is read faster together."""
        return work[len(work) * self.rank // self.size : len(work) * (self.rank + 1) // self.size]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the ranks, the same on each."""
        if self.size > 1:
            dist.all_reduce(x)
            x = x / self.size
        return x

    def largest(self, number: int) -> int:
        """The largest over the ranks, the same on each."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number], device=_collective_device())
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def from_first(self, work: Callable[[], T], *, long: str = "") -> T:
        """What ``work`` gives on rank 0 (something small), or the ValueError that it raises there, on every rank: on
        others as ``RefusedByFirst``. What may take longer than a collective waits has a name, for ``meet``."""
        if self.size == 1:
            return work()
        answer: list[T | ValueError | None] = [None]
        if self.rank == 0:
            try:
                answer = [work()]
            except ValueError as error:
                answer = [error]
        if long:
            self.meet(long)
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], ValueError):
            raise answer[0] if self.rank == 0 else RefusedByFirst(str(answer[0]))
        return cast(T, answer[0])

    def first_then_others(self, work: Callable[[], T]) -> T:
        """``work`` on rank 0, whose download or index the others find when they do it too; errors as ``from_first``."""
        done: list[T] = []
        self.from_first(lambda: done.append(work()))
        return done[0] if self.rank == 0 else work()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def meet(self, where: str) -> None:
        """Wait for all ranks at a place of this name where they do not work together any more. Not by a collective:
        whoever leaves first closes its connections, and may do so while another is still in the collective. Signals
        are heard meanwhile; of a rank that dies, torchrun tells the others by one.
        """
        if self.size == 1:
            return
        _MET[where] += 1
        where = f"{where}/{_MET[where]}"
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{where}/{self.rank}", "there")
        while not store.check([f"{where}/{rank}" for rank in range(self.size)]):
            time.sleep(0.05)

    def stop(self) -> None:
        """Leave the process group."""
        if self.size > 1 and self.own and dist.is_initialized():
            dist.destroy_process_group()


def _collective_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
