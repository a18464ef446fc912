"""Images per second of the training step, eager and compiled, alternating in one process.

python benchmarks/training.py --preset nano --latent 4 8 8 --threads 1 --out results/training/speed.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import machine, write_result
from ecar.config import ModelConfig, StageConfig
from ecar.network.model import ECAR
from ecar.network.presets import get_preset
from ecar.training.loss import Draws, stage_losses


def make_step(config: ModelConfig, batch: int, compiled: bool, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward and AdamW on random latents; the last stage on half of the batch."""
    torch.manual_seed(0)
    model = ECAR(config)
    if compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shapes = [(batch, config.channels, *s.side) for s in model.plan]
    noise, context = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes[:-1]]
    draws = Draws(noise, context, torch.rand(len(shapes), batch))
    z, labels = torch.randn(shapes[-1]), torch.randint(0, config.num_classes, (batch,))
    rows = tuple(batch // 2 if k else batch for k in range(len(shapes)))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = stage_losses(model, z, labels, draws, rows)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([loss.mean() for loss in losses]).sum().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--latent", type=int, nargs=3, default=[4, 8, 8], metavar=("C", "H", "W"))
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    preset, (channels, height, width) = get_preset(args.preset), args.latent
    config = ModelConfig(
        stages=StageConfig.for_latent((height, width), args.stages), channels=channels, num_classes=10,
        width=preset.width, heads=preset.heads, trunk_depth=preset.trunk_depth, head_depth=preset.head_depth,
    )  # fmt: skip
    sides = {
        "fp32": make_step(config, args.batch_size, False, torch.float32),
        "bf16": make_step(config, args.batch_size, False, torch.bfloat16),
        "bf16 compiled": make_step(config, args.batch_size, True, torch.bfloat16),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 2):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    rates = {name: round(args.batch_size / statistics.median(t), 1) for name, t in times.items()}
    ratios = {name: round(rate / rates["fp32"], 2) for name, rate in rates.items()}
    record = {"preset": args.preset, "batch_size": args.batch_size, "machine": machine()}
    record |= {"images_per_second": rates, "ratio_to_fp32": ratios}
    write_result(record, args.out)


if __name__ == "__main__":
    main()
