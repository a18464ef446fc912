"""Trainings over several processes, one after another, for tests: ``worker.py JOBS`` (under torchrun, or with forks).

A job is an object with the options of a training and, optionally: ``world`` (fork so many processes; importing torch
once is what makes this fast), ``stop_at`` and ``stop_rank`` (this rank gets a SIGTERM in this step), ``copy`` (start
from a copy of this run's folder), ``nan_at`` and ``nan_rank`` (the loss of this rank is not finite in these steps).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ecar.processes.signals import Stopped
from ecar.processes.world import World
from ecar.training import loop, loss
from ecar.training.config import TrainConfig

TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def start(jobs: Sequence[dict[str, Any]], folder: Path, *, torchrun: int | None = None, check: bool = True) -> str:
    """Run jobs in new processes; their output."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    launcher = [*TORCHRUN, "--nproc-per-node", str(torchrun)] if torchrun else []
    command = [sys.executable, *launcher, __file__, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def run(job: dict[str, Any]) -> None:
    """One job in this process."""
    stop_at, stop_rank = job.pop("stop_at", None), job.pop("stop_rank", 0)
    nan_at, nan_rank = job.pop("nan_at", ()), job.pop("nan_rank", 0)
    step, losses, bad = loop.Trainer.train_step, loss.stage_losses, [False]

    def with_faults(self: loop.Trainer) -> torch.Tensor | None:
        if self.step == stop_at and self.world.rank == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        bad[0] = self.step in nan_at and self.world.rank == nan_rank
        return step(self)

    def broken(*args: Any) -> list[torch.Tensor]:
        return [x * float("nan") if bad[0] else x for x in losses(*args)]

    loop.Trainer.train_step, loss.stage_losses = with_faults, broken  # type: ignore[method-assign]
    World.stop = leave  # type: ignore[method-assign]
    try:
        loop.train(TrainConfig.of(**{**job, "resolution": (8,)}))
        assert stop_at is None
    except Stopped as stopped:
        assert stop_at is not None and stopped.code == 75
    finally:
        loop.Trainer.train_step, loss.stage_losses = step, losses  # type: ignore[method-assign]


def leave(world: World) -> None:
    """Instead of leaving the group, which serves the next job too."""
    # Whoever of DDP is left would tear down the group with Python's lock held, and wait for a thread that wants it.
    assert not any(type(x) is torch.nn.parallel.DistributedDataParallel for x in gc.get_objects())
    world.barrier()


def fork(job: dict[str, Any], size: int) -> None:
    """One job in ``size`` processes. The store comes after them: a child of a process with threads may inherit a lock
    that nobody opens any more, and hang."""
    listening = socket.create_server(("localhost", 0))
    port, children = listening.getsockname()[1], []
    for rank in range(size):
        child = os.fork()
        if not child:
            listening.close()
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
            os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            try:
                run(job)
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
        children.append(child)
    store = dist.TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    codes = ends(children)
    del store
    assert codes == [0] * size, (job, codes)


def ends(children: list[int], patience: float = 10.0) -> list[int]:
    """Exit codes; where one failed, the others have ``patience`` seconds to end too."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
            deadline = min(deadline, time.monotonic() + patience) if codes[child] else deadline
        elif time.monotonic() > deadline:
            for left in set(children) - set(codes):
                os.kill(left, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.01)
    return [codes[child] for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]  # a second to import, in every fork
    jobs = json.loads(Path(sys.argv[1]).read_text())
    import matplotlib.figure  # noqa: F401  (once, instead of in every fork)
    import torch._dynamo  # (the first step of an optimizer does)

    if any((job["preset"] or "").startswith("dit-") for job in jobs):
        from diffusers import DiTTransformer2DModel  # noqa: F401
    for job in jobs:
        if source := job.pop("copy", None):
            shutil.copytree(source, job["out"])
        if size := job.pop("world", None):
            fork(job, size)
        else:
            run(job)
    if dist.is_initialized():  # by torchrun, for all the jobs
        dist.destroy_process_group()
