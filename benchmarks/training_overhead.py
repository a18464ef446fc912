"""What the trainer adds to forward, backward and optimizer: blocks of both in turns, in one process.

    taskset -c 1 python benchmarks/training_overhead.py --out results/training/overhead.json

"Whole" is the trainer's own loop (batch, noise, clipping, average, loss curves, log) on latents in memory. A checkpoint
and a sample grid, which come once in 1,000 steps, are timed by themselves and spread over their intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from common import machine, write_result
from ecar.data.latents import LatentTable
from ecar.pretrained.build import build_model
from ecar.tokenizers import PixelTokenizer
from ecar.training.build import build_config, with_data
from ecar.training.config import TrainConfig
from ecar.training.draws import draw_batch
from ecar.training.engine.log import RunLog
from ecar.training.engine.optim import make_optimizers
from ecar.training.engine.saving import Saver
from ecar.training.engine.trainer import Trainer
from ecar.training.generator import Generator
from ecar.training.loss import stage_losses


def make_trainer(args: argparse.Namespace, out: Path) -> Trainer:
    """A trainer with the default options, on random latents."""
    side, tokenizer = args.resolution, PixelTokenizer(factor=2)
    config = TrainConfig.of(
        data="random", out=str(out), preset=args.preset, resolution=(side,), batch_size=args.batch_size,
        device="cpu",
    ).resolve()  # fmt: skip
    torch.manual_seed(0)
    latents = torch.randn(1, args.images, tokenizer.channels, side // 2, side // 2).half()
    names = tuple(f"class {i}" for i in range(10))
    labels = torch.randint(0, 10, (args.images,))
    table = LatentTable(
        latents=latents, labels=labels, class_names=names, image_side=(side, side), tokenizer=tokenizer.fingerprint()
    )
    model = build_model(with_data(build_config(config, tokenizer), table))
    return Trainer(Generator(config, model, table, tokenizer, out), config.run, out, ema=config.optimizer.ema)


def task_of(trainer: Trainer) -> Generator:
    """What ``make_trainer`` gave it."""
    assert isinstance(trainer.task, Generator)
    return trainer.task


def make_bare(trainer: Trainer) -> Callable[[int], None]:
    """Forward, backward and optimizer of a model of the same kind, on one batch drawn before."""
    task = task_of(trainer)
    options, model = task.config.optimizer, build_model(task.module.config)
    optimizers = make_optimizers(model, options.optimizer, lr=options.lr)
    z, labels, draws = draw_batch(task.config, task.table, model.plan, model.config.null_class, 1)

    def bare(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                losses = stage_losses(model, z, labels, draws, task.rows)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            torch.stack([loss.mean() for loss in losses]).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

    return bare


def make_whole(trainer: Trainer, log: RunLog, saver: Saver) -> Callable[[int], None]:
    """The trainer's loop for some steps more, without what comes at intervals."""
    trainer._at_intervals = lambda *_: None  # type: ignore[method-assign]

    def whole(steps: int) -> None:
        trainer.options = dataclasses.replace(trainer.options, max_steps=trainer.step + steps)
        trainer._steps(log, saver)

    return whole


def timed(action: Callable[[], object]) -> float:
    """CPU seconds of this process in a call: on a shared core, wall time would count the others' work."""
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="s")
    parser.add_argument("--resolution", type=int, default=32, help="of images in 2x2 pixels a token")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--block", type=int, default=2, help="steps of a side before the other's turn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        trainer = make_trainer(args, out)
        interval = trainer.options.save_every
        bare, task = make_bare(trainer), task_of(trainer)
        with RunLog(out) as log:
            log.begin(0)
            saver = Saver(out, trainer.world, log, saved=0)
            whole = make_whole(trainer, log, saver)
            rounds = []
            for turn in range(args.rounds + 1):
                sides = [bare, whole] if turn % 2 else [whole, bare]
                seconds = {side: timed(partial(side, args.block)) / args.block for side in sides}
                if turn:  # the first warms up
                    rounds.append((seconds[bare], seconds[whole]))
            save = timed(lambda: trainer._save(saver, last=True))
        average = trainer.averaged()
        sample = timed(lambda: task.picture(average, 1))
    base = statistics.median(b for b, _ in rounds)
    ratios = [whole / bare for bare, whole in rounds]
    spread = (save + sample) / interval
    record = {
        "machine": machine(), "preset": args.preset,
        "parameters": task.module.num_parameters(), "batch_size": args.batch_size,
        "latent": [task.module.config.channels, *task.module.plan[-1].side],
        "stages": [list(s.side) for s in task.module.plan],
        "block_steps": args.block, "rounds": len(rounds),
        "cpu_seconds_per_bare_step": round(base, 4),
        "whole_to_bare": {"median": round(statistics.median(ratios), 4), "min": round(min(ratios), 4),
                          "max": round(max(ratios), 4), "each": [round(r, 4) for r in ratios]},
        "checkpoint_cpu_seconds": round(save, 3), "sample_grid_cpu_seconds": round(sample, 3),
        "save_every": interval,
        "intervals_share": round(spread / base, 5),
        "overhead": round(statistics.median(ratios) - 1 + spread / base, 4),
        "note": "CPU time of one thread on a shared machine: ratios of neighbouring blocks count",
    }  # fmt: skip
    write_result(record, args.out)


if __name__ == "__main__":
    main()
