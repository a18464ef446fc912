"""``ecar bench``: ECAR's sampling cost against DiT's, both measured here, in turns."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ecar.cli.options import check_dtype, output_file, parse, torch_dtype

if TYPE_CHECKING:
    from ecar.config import ModelConfig, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Time ECAR against DiT, random weights, latents only (no decoder)."""

    preset: str = "xl"
    """Model size of both: nano, ti, s, b, l or xl."""
    resolution: int = 256
    """Side of the images in pixels."""
    factor: int = 16
    """Pixels per latent position, for ECAR."""
    channels: int = 16
    """Latent channels, for ECAR."""
    stages: int = 3
    """ECAR's stages."""
    steps: tuple[int, ...] | None = None
    """ECAR's solver steps, one number or one per stage; default 8, then 4 for each finer stage."""
    guidance: bool = True
    """Guidance: ECAR in every stage but the last, DiT in every step."""
    against: str = "dit"
    """dit (the only peer that is measured)."""
    peer_steps: tuple[int, ...] = (250, 50)
    """DiT's solver steps."""
    peer_run_steps: int = 5
    """DiT steps that are really run; they cost the same at any time, so the seconds are multiplied."""
    peer_factor: int = 8
    """Pixels per latent position, for DiT (the published models: 8, patch 2, 4 channels)."""
    peer_patch: int = 2
    """Side of DiT's patches."""
    peer_channels: int = 4
    """Latent channels, for DiT."""
    classes: int = 1000
    """Number of classes."""
    batch: tuple[int, ...] = (1, 4)
    """Batch sizes."""
    repeats: int = 3
    """Measurements of each side, in turns; the median counts."""
    dtype: str = "bf16"
    """bf16 or fp32, both sides."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda."""
    out: str = "bench.json"
    """File to write (.json)."""


def run(arguments: Sequence[str]) -> None:
    """Parse, build, measure; prints a table and one JSON object as the last line."""
    options = parse(BenchOptions, arguments, "bench")
    out = output_file(options.out, (".json",))
    _check(options)
    import torch

    from ecar.benchmark.bench import compare, make_side, matmul_peak
    from ecar.devices import resolve_device

    device = resolve_device(options.device)
    dtype = torch_dtype(options.dtype)
    from ecar.config import SamplingConfig

    scale = 1.5 if options.guidance else 1.0
    peer_settings = {n: SamplingConfig(steps=(n,), guidance=(scale,), solver="euler") for n in options.peer_steps}
    ours = make_side("ecar", *_ecar(options), dtype=dtype, device=device)
    peer = make_side(
        "dit", _dit(options), peer_settings[options.peer_steps[0]], dtype=dtype, device=device,
        run_steps=options.peer_run_steps,
    )  # fmt: skip
    flops = {"ecar": ours.flops()}
    flops |= {f"dit {n} steps": replace(peer, settings=settings).flops() for n, settings in peer_settings.items()}
    record: dict[str, Any] = {
        "command": asdict(options),
        "machine": {
            "device": device,
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "matmul_tflops_per_second": round(matmul_peak(dtype, device), 4),
        },
        "parameters": {"ecar": ours.model.num_parameters(), "dit": peer.model.num_parameters()},
        "flops_per_image": flops,
        "measured": [],
        "ratios": [],
    }
    for batch in options.batch:
        measured = compare([ours, peer], batch, options.repeats)
        record["measured"].append(measured)
        for steps in peer_settings:
            seconds = measured["dit"]["seconds_per_batch"] * steps / options.peer_steps[0]
            record["ratios"].append({
                "batch": batch,
                "dit_steps": steps,
                "fewer_flops": round(flops[f"dit {steps} steps"]["total"] / flops["ecar"]["total"], 2),
                "less_time": round(seconds / measured["ecar"]["seconds_per_batch"], 2),
            })  # fmt: skip
    out.write_text(json.dumps(record, indent=2) + "\n")
    _print_table(record)
    print(json.dumps(record))


def _check(options: BenchOptions) -> None:
    if options.against != "dit":
        raise ValueError(f"--against must be dit, got {options.against!r}")
    check_dtype(options.dtype)
    if min((*options.batch, *options.peer_steps, options.peer_run_steps, options.repeats, options.classes)) < 1:
        raise ValueError("--batch, --peer-steps, --peer-run-steps, --repeats and --classes must be at least 1")
    if options.resolution % options.factor or options.resolution % (options.peer_factor * options.peer_patch):
        raise ValueError(f"--resolution {options.resolution} does not divide by the latents' factors")


def _ecar(options: BenchOptions) -> tuple[ModelConfig, SamplingConfig]:
    from ecar.config import SamplingConfig
    from ecar.presets import default_steps, preset_config
    from ecar.sampling.loop import check_settings

    side, stages = options.resolution // options.factor, options.stages
    config = preset_config(
        "ecar", options.preset, latent=(side, side), stages=stages, channels=options.channels,
        classes=options.classes, image=(options.resolution, options.resolution),
    )  # fmt: skip
    steps = options.steps or default_steps(stages)
    steps = steps * stages if len(steps) == 1 else steps
    guidance = (1.5 if options.guidance else 1.0,) * (stages - 1) + (1.0,)
    settings = SamplingConfig(steps=steps, guidance=guidance, solver="ab2")
    check_settings(settings, stages)
    return config, settings


def _dit(options: BenchOptions) -> ModelConfig:
    from ecar.presets import preset_config

    side = options.resolution // options.peer_factor
    return preset_config(
        "dit", options.preset, latent=(side, side), stages=1, channels=options.peer_channels,
        classes=options.classes, image=(options.resolution, options.resolution), patch=options.peer_patch,
    )  # fmt: skip


def _print_table(record: dict[str, Any]) -> None:
    for ratio, measured in ((r, m) for r in record["ratios"] for m in record["measured"]):
        if measured["ecar"]["batch"] == ratio["batch"]:
            print(
                f"batch {ratio['batch']}, DiT at {ratio['dit_steps']} steps: {ratio['fewer_flops']}x fewer FLOPs, "
                f"{ratio['less_time']}x less time ({measured['ecar']['seconds_per_batch']} s a batch)"
            )
