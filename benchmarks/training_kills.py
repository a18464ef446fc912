"""Kill a run of two processes at random moments, start it again each time, and compare with a run left alone.

    python benchmarks/training_kills.py --data photos/ --kills 20 --out results/training/kills.json

The kills are SIGKILLs. Every restart has to go on from the last checkpoint, and the final weights have to be those of
the undisturbed run, bit for bit. A run that writes no step for ``--patience`` seconds is aborted: every process says
where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_result


def command(data: str, out: Path, steps: int, processes: int) -> list[str]:
    """A small training under torchrun."""
    flags = {
        "data": data, "out": out, "tokenizer": "pixels:2", "resolution": 8, "preset": "16x2x1+1",
        "max-steps": steps, "batch-size": 8, "save-every": 5,
        "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    pairs = (str(x) for k, v in flags.items() for x in (f"--{k}", v))
    return [*launcher, "-m", "ecar", "train", *pairs]


def start(arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
    """The run. Its output goes to a file: whoever is left of a killed run would hold up the reader of a pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    with open(output, "wb") as file:
        return subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)


def last_step(out: Path) -> int:
    """Of the log; 0 without one."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:
        return 0  # torn by the kill


def checkpoints(out: Path) -> list[str]:
    """Names of what lies in the checkpoint folder."""
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def weights_hash(out: Path) -> str:
    """SHA-256 of the final weights."""
    return hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest()


def processes_of(out: Path) -> list[int]:
    """Ids of launcher (oldest, first) and workers, to which torchrun gives sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in arguments:
            found.append(int(entry.name))
    return sorted(found)


def wait(process: subprocess.Popen[bytes], out: Path, output: Path, patience: float, until: int | None = None) -> None:
    """For step ``until`` in the log, or for the end of all processes; SystemExit where a run hangs."""
    step, since = last_step(out), time.monotonic()
    while (process.poll() is None or processes_of(out)) and (until is None or step < until):
        time.sleep(0.01)
        if (now := last_step(out)) != step:
            step, since = now, time.monotonic()
        if time.monotonic() - since > patience:
            left = processes_of(out)
            for victim in reversed(left):  # workers first: torchrun would take them along
                os.kill(victim, signal.SIGABRT)
            time.sleep(1)
            raise SystemExit(f"no step in {patience:g} s after step {step}, processes {left}\n{output.read_text()}")


def kill_and_restart(
    arguments: list[str], out: Path, output: Path, kills: int, chance: random.Random, patience: float
) -> list[dict[str, object]]:
    """Kill ``kills`` times, each after a random number of new steps or during start-up; one record per kill.

    Every second kill takes a single worker, where steps are taken: the others have to go by themselves.
    """
    records: list[dict[str, object]] = []
    while len(records) < kills:
        process, before, wanted = start(arguments, output), last_step(out), chance.randint(0, 12)
        began, single = time.perf_counter(), wanted > 0 and len(records) % 2 == 1
        wait(process, out, output, patience, until=before + wanted)
        time.sleep(chance.random() * (2.0 if wanted == 0 else 0.1))
        if process.poll() is not None:
            text = output.read_text()
            raise SystemExit(f"the run ended by itself (rc {process.returncode}); ask for more --steps\n{text}")
        victims = processes_of(out)
        for victim in victims[-1:] if single else victims:
            os.kill(victim, signal.SIGKILL)
        killed = time.perf_counter()
        wait(process, out, output, patience)
        records.append({
            "kill": len(records) + 1,
            "killed": "one worker" if single else f"all {len(victims)} processes",
            "seconds_after_start": round(killed - began, 2),
            "seconds_until_all_were_gone": round(time.perf_counter() - killed, 2),
            "step_before": before,
            "step_at_kill": last_step(out),
            "checkpoints": checkpoints(out),
        })  # fmt: skip
        print(records[-1], flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=90.0, help="seconds without a step after which a run hangs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        whole, killed, output = folder / "whole", folder / "killed", folder / "output"
        undisturbed = start(command(args.data, whole, args.steps, args.processes), folder / "undisturbed")
        arguments = command(args.data, killed, args.steps, args.processes)
        records = kill_and_restart(arguments, killed, output, args.kills, random.Random(args.seed), args.patience)
        last = start(arguments, output)
        for process, out, file in ((last, killed, output), (undisturbed, whole, folder / "undisturbed")):
            wait(process, out, file, args.patience)
            if process.returncode:
                raise SystemExit(f"{out.name}: rc {process.returncode}\n{file.read_text()}")
        hashes = [weights_hash(out) for out in (whole, killed)]
        record = {
            "kills": records, "steps": args.steps, "processes": args.processes, "seed": args.seed,
            "undisturbed_sha256": hashes[0], "killed_sha256": hashes[1], "same": hashes[0] == hashes[1],
        }  # fmt: skip
        write_result(record, args.out)
        sys.exit(0 if record["same"] else 1)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
