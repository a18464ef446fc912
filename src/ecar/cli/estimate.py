"""``ecar estimate``: what training and sampling a model would take, before it exists."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ecar.cli.options import check_dtype, output_file, parse


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """Parameters, memory, FLOPs and time, without allocating weights."""

    preset: str = "xl"
    """Model, as in `ecar train`: nano, ti, s, b, l, xl, or WIDTHxHEADSxTRUNK+HEAD, as in 1152x16x8+20. dit-xl/2 is
    DiT of patch size 2; as published with --factor 8 --channels 4."""
    resolution: int = 256
    """Side of the images in pixels."""
    factor: int = 16
    """Pixels per latent position of the tokenizer."""
    channels: int = 16
    """Latent channels."""
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
    """Share of each batch that trains each stage, as in `ecar train`; default 1 each."""
    images: int = 1_281_167
    """Images per epoch."""
    epochs: float = 80
    """Epochs of training."""
    tflops: float = 400.0
    """Throughput of one device in TFLOP/s that is reached in practice (not the peak of the data sheet)."""
    devices: int = 1
    """Number of devices, scaling taken as perfect."""
    out: str | None = None
    """Also write the record here (.json)."""


OPTIONS = EstimateOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, estimate; prints one JSON object as the last line."""
    options = parse(EstimateOptions, arguments, "estimate")
    out = output_file(options.out, (".json",)) if options.out else None
    for name in ("images", "epochs", "tflops", "devices", "batch_size", "classes", "factor"):
        if not 0 < getattr(options, name) < math.inf:  # so nan fails too
            raise ValueError(f"`{name}` must be a positive number, got {getattr(options, name)}")
    check_dtype(options.dtype)
    side, rest = divmod(options.resolution, options.factor)
    if rest:
        raise ValueError(f"--resolution {options.resolution} does not divide by --factor {options.factor}")
    from ecar.config import SamplingConfig
    from ecar.cost.estimate import estimate
    from ecar.network.presets import default_steps, get_preset, preset_config
    from ecar.sampling.loop import check_settings
    from ecar.training.shape import shares, through

    dit = get_preset(options.preset).kind == "dit"
    stages = options.stages or (1 if dit else 3)
    config = preset_config(
        options.preset, latent=(side, side), stages=stages, channels=options.channels, classes=options.classes,
        image=(options.resolution, options.resolution),
    )  # fmt: skip
    steps = options.steps or ((250,) if dit else default_steps(stages))
    scale = 1.5 if options.guidance else 1.0
    settings = SamplingConfig(
        steps=steps * stages if len(steps) == 1 else steps,
        guidance=(scale,) if stages == 1 else (scale,) * (stages - 1) + (1.0,),
        solver="ab2",
    )
    check_settings(settings, stages)
    share = through(shares(options.stage_share, stages))
    found = estimate(config, settings, batch=options.batch_size, share=share, bf16=options.dtype == "bf16")
    epoch, rate = found["training_flops_per_image"] * options.images, 1e12 * options.tflops * options.devices
    record = {
        **asdict(options), "sides": config.stages.sides, "sampling": settings.to_json(), **found,
        "training_flops_per_epoch": epoch,
        "training_hours": round(epoch * options.epochs / rate / 3600, 3),
        "sampling_images_per_second": round(rate / found["sampling_flops_per_image"]["total"], 3),
        "not_counted": "decoder",
    }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
