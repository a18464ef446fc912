"""``ecar estimate``: what training and sampling a model would take, before it exists."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ecar.cli.options import check_dtype, output_file, parse


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """Parameters, memory, FLOPs and time, without allocating weights."""

    preset: str = "xl"
    """Model size: nano, ti, s, b, l, xl, or WIDTHxHEADSxTRUNK+HEAD, as in 1152x16x8+20."""
    model: str = "ecar"
    """ecar or dit."""
    resolution: int = 256
    """Side of the images in pixels."""
    factor: int = 16
    """Pixels per latent position of the tokenizer; for dit, divided by --patch."""
    channels: int = 16
    """Latent channels."""
    patch: int = 1
    """Side of DiT's patches; the latent is then that much finer (factor 8 and patch 2: the published DiT)."""
    stages: int | None = None
    """Number of stages; default 3, and 1 for dit."""
    classes: int = 1000
    """Number of classes."""
    steps: tuple[int, ...] | None = None
    """Solver steps, one number or one per stage; default 8, then 4 for each finer stage; 250 for dit."""
    guidance: bool = False
    """Guidance in every stage but the last (dit: everywhere): two head passes a step there."""
    batch_size: int = 256
    """Images per step on one device, for memory."""
    dtype: str = "bf16"
    """Autocast of training: bf16 or fp32."""
    stage_share: tuple[float, ...] = ()
    """Share of each batch that trains each stage, as in ``ecar train``; default 1 each."""
    images: int = 1_281_167
    """Images per epoch."""
    epochs: float = 80
    """Epochs of training."""
    tflops: float = 400.0
    """Throughput of one device in TFLOP/s that is reached in practice (not the peak of the data sheet)."""
    devices: int = 1
    """Number of devices, scaling taken as perfect."""
    parallel: str = "ddp"
    """ddp (a copy of everything on each device) or fsdp (split over all devices)."""
    accumulate: int = 1
    """Passes of --batch-size images on each device that make one update."""
    storage_gbs: float = 2.0
    """GB/s at which a checkpoint is written."""
    save_minutes: float = 30.0
    """Minutes between checkpoints."""
    restart_minutes: float = 10.0
    """Minutes to notice a failure and start again."""
    out: str | None = None
    """Also write the record here (.json)."""


OPTIONS = EstimateOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, estimate; prints one JSON object as the last line."""
    options = parse(EstimateOptions, arguments, "estimate")
    out = output_file(options.out, (".json",)) if options.out else None
    positive = options.images, options.epochs, options.tflops, options.devices, options.batch_size, options.classes
    if not all(0 < value < math.inf for value in positive):  # so nan fails too
        raise ValueError("--images, --epochs, --tflops, --devices, --batch-size and --classes must be positive numbers")
    rate = 1e12 * options.tflops * options.devices
    if not 0 < rate < math.inf or not options.images * options.epochs / rate * 1e18 < math.inf:  # an image takes less
        raise ValueError("--tflops, --devices, --images and --epochs: these give times that are no numbers")
    check_dtype(options.dtype)
    if options.factor < 1 or options.patch < 1 or options.resolution % (options.factor * options.patch):
        raise ValueError(
            f"--resolution {options.resolution} does not divide by factor x patch ({options.factor}, {options.patch})"
        )
    from ecar.config import SamplingConfig
    from ecar.cost.cluster import ClusterPlan, cluster
    from ecar.cost.estimate import estimate
    from ecar.network.presets import default_steps, preset_config
    from ecar.sampling.loop import check_settings
    from ecar.training.shape import shares, through

    plan = ClusterPlan(
        devices=options.devices, tflops=options.tflops, parallel=options.parallel, batch=options.batch_size,
        accumulate=options.accumulate, images=options.images, epochs=options.epochs, storage_gbs=options.storage_gbs,
        save_minutes=options.save_minutes, restart_minutes=options.restart_minutes,
    )  # fmt: skip
    stages = (1 if options.model == "dit" else 3) if options.stages is None else options.stages
    side = options.resolution // options.factor
    config = preset_config(
        options.model, options.preset, latent=(side, side), stages=stages, channels=options.channels,
        classes=options.classes, image=(options.resolution, options.resolution), patch=options.patch,
    )  # fmt: skip
    steps = options.steps or ((250,) if options.model == "dit" else default_steps(stages))
    steps = steps * stages if len(steps) == 1 else steps
    scale = 1.5 if options.guidance else 1.0
    guidance = (scale,) if stages == 1 else (scale,) * (stages - 1) + (1.0,)
    settings = SamplingConfig(steps=steps, guidance=guidance, solver="ab2")
    check_settings(settings, stages)
    share = through(shares(options.stage_share, stages))
    record = estimate(config, settings, batch=options.batch_size, share=share, bf16=options.dtype == "bf16")
    training, sampling = record["training_flops_per_image"], record["sampling_flops_per_image"]
    memory, parameters = record["training_memory_bytes"], record["parameters"]
    assert isinstance(training, int) and isinstance(sampling, dict)
    assert isinstance(memory, dict) and isinstance(parameters, dict)
    saved, total = memory["saved for backward"], parameters["total"]
    run = cluster(config, plan, parameters=total, activations=saved, flops_per_image=training, share=share)
    record = {
        "model": options.model, "preset": options.preset, "resolution": options.resolution,
        "sides": [list(s) for s in config.stages.sides], "sampling": settings.to_json(), **record,
        "training_flops_per_epoch": training * options.images,
        "training_hours": round(training * options.images * options.epochs / rate / 3600, 3),
        "run": run,
        "sampling_images_per_second": round(rate / sampling["total"], 3),
        "assumed": {"tflops": options.tflops, "devices": options.devices, "images": options.images,
                    "epochs": options.epochs, "stage_share": share, "decoder": "not counted"},
    }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
