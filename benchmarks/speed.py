"""Time sampling of a model with each option that makes it faster, and what the option does to the images.

Images per second at --batch, seconds of one image, both with decoding; the options take turns in one process and the
median counts. The difference of the images is against eager float32 with the same seeds. With --data, the Frechet
distance and KID of --num balanced samples of each option, seeds 0, 1, ..., against those real images.

    python benchmarks/speed.py --model fashion --threads 2 --data test.parquet --out results/sampling_speed/fashion.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from common import machine, matmul_peak, write_result
from ecar import Pipeline
from ecar.evaluation.extractors import get_extractor
from ecar.evaluation.figures import measure
from ecar.evaluation.reference import read_images, reference_from_images
from ecar.evaluation.samples import Samples

OPTIONS: dict[str, dict[str, object]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp32 compiled": {"compile": True},
    "bf16 compiled": {"dtype": torch.bfloat16, "compile": True},
}
GRAPHS: dict[str, dict[str, object]] = {
    "bf16 graphs": {"dtype": torch.bfloat16, "cuda_graphs": True},
    "bf16 compiled graphs": {"dtype": torch.bfloat16, "compile": True, "cuda_graphs": True},
}


def draw(pipe: Pipeline, batch: int) -> tuple[float, np.ndarray]:
    """Seconds of one batch, decoding included, and the images (B, H, W, 3 or 1) uint8."""
    classes = pipe.model.config.num_classes
    labels = [i % classes for i in range(batch)] if classes else None
    start = time.perf_counter()
    output = pipe(labels, seeds=range(batch), batch_size=batch)
    seconds = time.perf_counter() - start
    return seconds, np.stack([np.asarray(image) for image in output.images])


def quality(pipes: dict[str, Pipeline], data: str, num: int, batch: int) -> dict[str, dict[str, object]]:
    """Of each option: what ``ecar evaluate`` measures, for the same labels and seeds."""
    extractor = get_extractor("efficientnet-lite0")
    height, width = next(iter(pipes.values())).model.config.image_side
    images, labels, names = read_images(data, "test", height, width, None)
    reference = reference_from_images(data, images, labels, names, extractor, Path("~/.cache/ecar").expanduser())
    result = {}
    for name, pipe in pipes.items():
        classes = pipe.model.config.num_classes
        wanted = [i % classes for i in range(num)] if classes else None
        drawn = pipe(wanted, seeds=range(num), batch_size=batch).images
        stacked = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in drawn])).permute(0, 3, 1, 2)
        result[name] = measure(Samples(stacked, None), reference, extractor)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--options", nargs="+", choices=[*OPTIONS, *GRAPHS], help="default: all that the device has")
    parser.add_argument("--data", help="real images: also measure what each option costs in quality")
    parser.add_argument("--num", type=int, default=2000, help="samples of each option for that")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = OPTIONS | GRAPHS if args.device.startswith("cuda") else OPTIONS
    if missing := [name for name in args.options or () if name not in options]:
        parser.error(f"--options {missing[0]}: CUDA graphs need --device cuda")
    pipes = {
        name: Pipeline.from_pretrained(args.model, device=args.device, **options[name])  # type: ignore[arg-type]
        for name in args.options or options
    }
    first: dict[str, float] = {}
    images: dict[str, np.ndarray] = {}
    for name, pipe in pipes.items():
        start = time.perf_counter()
        images[name] = draw(pipe, args.batch)[1].astype(np.float64)
        draw(pipe, 1)
        first[name] = time.perf_counter() - start
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in pipes for batch in (args.batch, 1)}
    for _ in range(args.repeats):
        for (name, batch), seconds in times.items():
            seconds.append(draw(pipes[name], batch)[0])
    scores = quality(pipes, args.data, args.num, args.batch) if args.data else {}
    reference = images.get("fp32", next(iter(images.values())))
    rows = []
    for name in pipes:
        many, one = (statistics.median(times[name, batch]) for batch in (args.batch, 1))
        rows.append({
            "options": name,
            "images_per_second": round(args.batch / many, 2),
            "seconds_for_one_image": round(one, 4),
            "seconds_all": {str(b): [round(t, 4) for t in times[name, b]] for b in (args.batch, 1)},
            "first_calls_seconds": round(first[name], 1),
            "mean_pixel_difference_of_255": round(float(np.abs(images[name] - reference).mean()), 3),
            **scores.get(name, {}),
        })  # fmt: skip
        print(rows[-1], flush=True)
    settings = next(iter(pipes.values())).settings().to_json()
    record = {
        "model": args.model, "machine": machine(args.device), "batch": args.batch, "settings": settings, "rows": rows,
        "matmul_tflops_per_second": {n: round(matmul_peak(d, args.device), 3) for n, d in
                                     (("bf16", torch.bfloat16), ("fp32", torch.float32))},
    }  # fmt: skip
    write_result(record, args.out)


if __name__ == "__main__":
    main()
