"""A process that stalls is named by the others, which end instead of waiting for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_processes import job
from worker import TORCHRUN

from ecar.processes.watchdog import BACKWARD, FORWARD, READ, WAIT, Seen


def test_who_is_least_far_is_named_and_only_after_the_limit() -> None:
    seen = Seen(3, 10.0, 0.0)
    seen.update({0: f"1 4 {WAIT}", 1: f"1 4 {FORWARD}", 2: f"1 4 {BACKWARD}"}, 1.0)
    for second in range(2, 12):  # all give signs of life, none moves
        seen.update({rank: f"{second} 4 {(WAIT, FORWARD, BACKWARD)[rank]}" for rank in range(3)}, float(second))
        assert seen.stalled(float(second)) is None
    assert seen.stalled(11.5) == "no progress by rank 1 (step 4, forward pass)"
    seen.update({1: f"12 4 {BACKWARD}"}, 12.0)
    assert seen.stalled(13.0) is None
    seen.update({0: f"20 5 {READ}", 1: f"20 5 {READ}"}, 20.0)
    assert seen.stalled(22.5) == "no sign of life from rank 2 (step 4, backward pass)"  # since second 11


def test_a_rank_that_never_spoke_is_named() -> None:
    seen = Seen(2, 10.0, 0.0)
    for second in range(1, 12):
        seen.update({0: f"{second} 1 {BACKWARD}"}, float(second))
    assert seen.stalled(11.0) == "no sign of life from rank 1 (step 0, reading data)"


def test_long_steps_are_no_stall_while_the_last_one_moves() -> None:
    seen = Seen(2, 10.0, 0.0)
    for step in range(1, 30):
        seen.update({0: f"{step} {step // 5} {WAIT}", 1: f"{step} {step // 5} {FORWARD}"}, float(step))
        assert seen.stalled(float(step)) is None


SLEEPS = """
import time
import torch
from ecar.training import draws
draw = draws.draw_batch
def stalls(config, table, plan, null_class, step):
    if step == 3 and torch.distributed.get_rank() == 1:
        time.sleep(1000)
    return draw(config, table, plan, null_class, step)
draws.draw_batch = stalls
"""
RUNS = """
import sys
from ecar.cli.main import main
from ecar.processes import watchdog
watchdog.STALL_SECONDS = 3.0
sys.exit(main(sys.argv[1:]))
"""


def command(data: Path, out: Path, **changes: Any) -> list[str]:
    values = {k: v for k, v in job(data, out, **changes).items() if v not in (None, ()) and not isinstance(v, bool)}
    joined = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in values.items()}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in joined.items()]
    return ["train", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_stalled_rank_is_named_and_all_processes_end(digits_folder: Path, tmp_path: Path, stopped: bool) -> None:
    """Once the main thread hangs where data are read, once the whole process is stopped (SIGSTOP)."""
    script = tmp_path / "train.py"
    script.write_text(RUNS if stopped else SLEEPS + RUNS)
    out = tmp_path / "run"
    flags = command(digits_folder, out, max_steps=100_000, save_every=100_000)
    launcher = [sys.executable, *TORCHRUN, "--nproc-per-node", "2", str(script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(launcher, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < (2 if stopped else 1):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    began, workers = time.monotonic(), processes(out, process.pid)
    assert len(workers) == 2
    if stopped:
        os.kill(workers[1], signal.SIGSTOP)
        while alive(workers[0]):
            assert time.monotonic() < began + 30
            time.sleep(0.05)
        os.kill(workers[1], signal.SIGCONT)  # torchrun's SIGTERM waits for it
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    reason = "no sign of life from rank 1 (step " if stopped else "no progress by rank 1 (step 3, reading data)"
    assert reason in output and "for 3 s; stopping" in output, output
    assert not any(map(alive, workers))


def processes(out: Path, parent: int) -> list[int]:
    """The workers, in the order of their ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != parent:
                environment = (entry / "environ").read_bytes().split(b"\0")
                rank = next(int(x.partition(b"=")[2]) for x in environment if x.startswith(b"RANK="))
                found.append((rank, int(entry.name)))
        except (OSError, StopIteration):
            continue
    return [pid for _, pid in sorted(found)]


def alive(pid: int) -> bool:
    """Running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
