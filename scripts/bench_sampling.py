"""Time sampling of a model: images per second at batch 64, seconds for one image. Median of repeated runs.

python scripts/bench_sampling.py --model fashion --threads 2 --out docs/results/fashion_speed.json
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
from results import write_result

from ecar import Pipeline


def seconds(pipe: Pipeline, batch: int, guidance: float, steps: tuple[int, ...] | None, repeats: int) -> list[float]:
    """Wall-clock of ``repeats`` calls after one warm-up, decoding included."""
    classes = max(1, pipe.model.config.num_classes)
    labels = [i % classes for i in range(batch)] if pipe.model.config.num_classes else None
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        pipe(
            labels, seeds=range(repeat * batch, (repeat + 1) * batch), guidance=guidance, steps=steps, batch_size=batch
        )
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=dtype)
        for guidance in (1.0, 2.0):
            for batch in (64, 1):
                times = seconds(pipe, batch, guidance, tuple(args.steps) if args.steps else None, args.repeats)
                middle = statistics.median(times)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "guidance": guidance,
                        "batch": batch,
                        "seconds": round(middle, 4),
                        "spread": [round(min(times), 4), round(max(times), 4)],
                        "images_per_second": round(batch / middle, 2),
                    }
                )
                print(rows[-1], flush=True)
    steps = args.steps or (pipe.model.config.sampling.steps if pipe.model.config.sampling else None)
    record = {
        "model": args.model, "threads": args.threads, "device": args.device, "processor": platform.processor(),
        "torch": torch.__version__, "steps": steps, "rows": rows,
    }  # fmt: skip
    write_result(record, args.out)


if __name__ == "__main__":
    main()
