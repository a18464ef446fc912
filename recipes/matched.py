"""Train ECAR and DiT on the same latents for the same training FLOPs, several seeds, one run per core.

    python recipes/matched.py --data LATENTS --out runs/study --preset nano --steps 9000 --seeds 0 1 2 --cores 0 1 \\
        --options "--optimizer muon --lr 2e-3 --compile"

--steps are ECAR's; DiT gets as many as cost the same by ``ecar.cost.formulas.training_flops``. Runs resume where they
were; finished ones have nothing left to do. Without --cores, runs go one after the other on the whole machine.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import subprocess
import sys
import threading
from pathlib import Path

from ecar.cli.options import parse
from ecar.cost.formulas import training_flops
from ecar.training.build import build_config, load_table, with_data
from ecar.training.config import TrainConfig
from ecar.training.shape import through


def step_flops(options: list[str]) -> int:
    """Training FLOPs of one step of ``ecar train`` with these options."""
    config = parse(TrainConfig, [*options, "--out", "unused"], "train").resolve()
    table, tokenizer = load_table(config)
    model = with_data(build_config(config, tokenizer), table)
    return config.run.batch_size * training_flops(model, through(config.stages.stage_share))


def work(jobs: queue.Queue[tuple[str, list[str]]], core: int | None, out: Path, failed: list[str]) -> None:
    """Run jobs until there are none; the trainer itself refuses a folder of other options, and resumes the same."""
    while True:
        try:
            name, command = jobs.get_nowait()
        except queue.Empty:
            return
        pin = [] if core is None else ["taskset", "-c", str(core)]
        threads = {} if core is None else {"OMP_NUM_THREADS": "1"}
        with open(out / f"{name}.out", "a") as log:
            done = subprocess.run([*pin, *command], stdout=log, stderr=log, env={**os.environ, **threads})
        if done.returncode:
            failed.append(name)
        print(f"{name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="latent cache of ecar encode")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--steps", type=int, required=True, help="of ECAR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cores", type=int, nargs="+", help="one run at a time on each")
    parser.add_argument("--options", default="", help="of ecar train, both sides")
    parser.add_argument("--ecar-options", default="", help="of ecar train, ECAR only")
    args = parser.parse_args()
    own = shlex.split(args.ecar_options)
    common = ["--data", args.data, "--resolution", str(args.resolution)]
    common += shlex.split(args.options)
    options = {
        "ecar": [*common, "--preset", args.preset, *own],
        "dit": [*common, "--preset", f"dit-{args.preset}"],
    }
    ratio = step_flops(options["dit"]) / step_flops(options["ecar"])
    steps = {"ecar": args.steps, "dit": round(args.steps / ratio)}
    print(f"a DiT step costs {ratio:.4f} of ECAR: {args.steps} steps of ECAR, {steps['dit']} of DiT", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs: queue.Queue[tuple[str, list[str]]] = queue.Queue()
    for seed in args.seeds:
        for kind in ("ecar", "dit"):
            name = f"{kind}_seed{seed}"
            command = [sys.executable, "-m", "ecar", "train", *options[kind], "--out", str(args.out / name)]
            jobs.put((name, [*command, "--max-steps", str(steps[kind]), "--seed", str(seed)]))
    failed: list[str] = []
    workers = [threading.Thread(target=work, args=(jobs, core, args.out, failed)) for core in args.cores or [None]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
