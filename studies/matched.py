"""Train ECAR and DiT on the same latents for the same training FLOPs, several seeds, one run per core.

    python studies/matched.py --data LATENTS --out runs/study --preset nano --steps 9000 --seeds 0 1 2 --cores 0 1 \\
        --options "--optimizer muon --lr 2e-3 --compile"

--steps are ECAR's; DiT gets as many as cost the same by ``benchmark.formulas.training_flops``. Runs resume where they
were; finished ones are left alone. Without --cores, runs go one after the other on the whole machine.
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

from ecar.benchmark.formulas import training_flops
from ecar.training.config import TrainConfig
from ecar.training.loop import build_config, load_table, with_data


def matched_steps(data: str, preset: str, steps: int, ecar_options: list[str], resolution: int) -> tuple[int, float]:
    """DiT's steps of equal training FLOPs, and how many times an ECAR step a DiT step costs."""
    cost = {}
    share = _value(ecar_options, "--stage-share")
    for kind in ("ecar", "dit"):
        config = TrainConfig(
            data=data, out="unused", model=kind, preset=preset, resolution=(resolution,),
            stage_share=tuple(float(s) for s in share) if share and kind == "ecar" else (),
        )  # fmt: skip
        table, tokenizer = load_table(config)
        cost[kind] = training_flops(with_data(build_config(config, tokenizer), table), config.stage_share)
    ratio = cost["dit"] / cost["ecar"]
    return round(steps / ratio), ratio


def _value(options: list[str], flag: str) -> list[str]:
    """What follows ``flag``, up to the next flag."""
    if flag not in options:
        return []
    rest = options[options.index(flag) + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return [part for word in rest[:end] for part in word.split(",")]


def work(jobs: queue.Queue[tuple[str, list[str]]], core: int | None, out: Path) -> None:
    """Run jobs until there are none."""
    while True:
        try:
            name, command = jobs.get_nowait()
        except queue.Empty:
            return
        if (out / name / "final" / "model.safetensors").exists():
            continue
        pin = [] if core is None else ["taskset", "-c", str(core)]
        threads = {} if core is None else {"OMP_NUM_THREADS": "1"}
        with open(out / f"{name}.out", "a") as log:
            done = subprocess.run([*pin, *command], stdout=log, stderr=log, env={**os.environ, **threads})
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
    dit_steps, ratio = matched_steps(args.data, args.preset, args.steps, own, args.resolution)
    print(f"a DiT step costs {ratio:.4f} ECAR steps: {args.steps} steps of ECAR, {dit_steps} of DiT", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs: queue.Queue[tuple[str, list[str]]] = queue.Queue()
    for seed in args.seeds:
        for kind, steps, options in (("ecar", args.steps, own), ("dit", dit_steps, [])):
            name = f"{kind}_seed{seed}"
            command = [sys.executable, "-m", "ecar", "train", "--model", kind, "--data", args.data]
            command += ["--out", str(args.out / name), "--preset", args.preset, "--resolution", str(args.resolution)]
            command += ["--max-steps", str(steps), "--seed", str(seed), *shlex.split(args.options), *options]
            jobs.put((name, command))
    workers = [threading.Thread(target=work, args=(jobs, core, args.out)) for core in args.cores or [None]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
