"""Commands of ``ecar`` in several processes, for tests: ``several.py JOBS``, one job after another.

A job has ``words`` (of the command line), ``world`` (so many processes are forked: importing torch once is what makes
this fast), and optionally ``kill``: a rank that gets SIGKILL when it would write its second file.
"""

from __future__ import annotations

import json
import os
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

from ecar.cli.main import main
from ecar.data import encoding
from ecar.evaluation import making
from ecar.fitting import run as fitting  # noqa: F401  (its imports, once for all)


def start(jobs: Sequence[dict[str, Any]], folder: Path) -> tuple[list[list[int]], str]:
    """Run jobs; the exit codes of each one's processes, and what all said."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "codes.json").read_text()), done.stdout + done.stderr


def killed_in_its_second_file() -> None:
    """From here on."""
    calls: list[int] = []
    for module, name in ((making, "write_npz"), (encoding, "_write_shard")):
        real = getattr(module, name)

        def writes(*args: Any, real: Any = real) -> None:
            calls.append(1)
            if len(calls) == 2:
                time.sleep(0.5)  # the others are waiting by then
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        setattr(module, name, writes)


def run(job: dict[str, Any]) -> list[int]:
    """Exit codes of the processes of a job. The store comes after them: a child of a process with threads may inherit a
    lock that nobody opens any more."""
    listening, size = socket.create_server(("localhost", 0)), job.get("world", 1)
    environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(listening.getsockname()[1])}
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            listening.close()
            if size > 1:
                os.environ |= {**environment, "RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            if job.get("kill") == rank:
                killed_in_its_second_file()
            try:
                code = main(job["words"])
            except SystemExit as end:
                code = int(end.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    codes: dict[int, int] = {}
    while len(codes) < size:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:  # what torchrun does
            for left in set(children) - set(codes):
                os.kill(left, signal.SIGTERM)
    del store
    return [codes[child] for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    codes = [run(job) for job in json.loads(path.read_text())]
    (path.parent / "codes.json").write_text(json.dumps(codes))
