"""ECAR's sampling cost against DiT's, both with random weights and measured here, in turns, in one process.

    python benchmarks/sampling.py --preset xl --resolution 256 --peer-steps 250 50 --batch 1 4 --out bench.json

Prints ratios, and one JSON object as the last line. MAR, VAR and FlowAR are computed from their published
configurations (published.py). ``--repeats 0`` times nothing: FLOPs, parameters and memory in half a minute.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import tyro

from common import coarse_guidance, machine, matmul_peak, write_result
from ecar.cli.options import check_dtype, output_file, torch_dtype, usable_dtype
from ecar.config import ModelConfig, SamplingConfig
from ecar.cost.memory import sampling_memory
from ecar.devices import resolve_device
from ecar.network.presets import default_steps, preset_config
from ecar.sampling.loop import check_settings
from published import published
from resolutions import cost_by_resolution, draw_costs
from timing import Side, compare, count_parameters, decoder_cost, flops_per_image, make_side


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time ECAR against DiT with random weights; other systems are computed from their published configurations."""

    preset: str = "xl"
    """Model size of both: nano, ti, s, b, l, xl, or WIDTHxHEADSxTRUNK+HEAD, as in 1152x16x8+20."""
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
    curve: tuple[str, ...] = ()
    """Further settings of ECAR's steps to measure in the same turns, such as 6+3+3 4+2+2."""
    guidance: bool = True
    """Guidance: ECAR in every stage but the last, DiT in every step."""
    guide_last: bool = False
    """Guidance of ECAR in its last stage too."""
    distilled: bool = False
    """ECAR as after `ecar train --distill`, in which guidance costs nothing; DiT keeps its second pass."""
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
    """Measurements of each side, in turns; the median counts. 0: FLOPs, parameters and memory only (half a minute)."""
    optimized: bool = False
    """Also measure both sides compiled (minutes more; on CPU it needs g++)."""
    cuda_graphs: bool = False
    """Also measure both sides compiled and replaying CUDA graphs."""
    decoder: str = "none"
    """Also time an autoencoder's decoder on both sides' latents: none, kl (diffusers' AutoencoderKL in the sizes of
    Stable Diffusion's f8 and LDM's f16) or tiny (AutoencoderTiny)."""
    dtype: str = "bf16"
    """bf16 or fp32, both sides."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda."""
    plot: str | None = None
    """Also draw FLOPs against resolution (.png)."""
    out: str = "sampling.json"
    """File to write (.json)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, write. Wrong input ends the process with exit code 2 and one line."""
    options = tyro.cli(Options, args=arguments, prog="sampling.py", config=(tyro.conf.OmitArgPrefixes,))
    try:
        run(options)
    except ValueError as error:
        print(f"sampling.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: Options) -> None:
    """Build, measure; prints a table and one JSON object as the last line.

    Raises:
        ValueError: options that cannot be, or that would do nothing; before anything is timed.
    """
    out = output_file(options.out, (".json",))
    plot = output_file(options.plot, (".png",), "--plot") if options.plot else None
    _check(options)
    options = replace(options, dtype=usable_dtype(options.dtype, options.device))
    device, dtype = resolve_device(options.device), torch_dtype(options.dtype)
    _check_tools(options, device)
    systems: dict[str, Callable[[int], tuple[ModelConfig, SamplingConfig]]] = {
        "ecar": lambda side: _ecar(options, side),
        "dit": lambda side: (_dit(options, side), _euler(options)[0]),
    }
    by_resolution = cost_by_resolution(systems, options.resolution)  # first: it refuses what cannot be built
    peaks = [matmul_peak(dtype, device)] if options.repeats else []
    record: dict[str, Any] = {
        "command": asdict(options),
        "machine": machine(device),
        **_measure(options, device),
    }
    if options.repeats:  # again: machines that are shared or warm up change
        record["machine"]["matmul_tflops_per_second"] = round(max(*peaks, matmul_peak(dtype, device)), 4)
    record["by_resolution"] = by_resolution
    record["computed_at_256"] = [{**asdict(system), "total_flops": system.total} for system in published()]
    if plot is not None:
        draw_costs(by_resolution, published() if options.resolution == 256 else [], plot)
    _print_table(record)
    write_result(record, out)


def _measure(options: Options, device: str) -> dict[str, Any]:
    """Parameters, memory and FLOPs of both sides; seconds and ratios, as they are and optimised."""
    ours, peer = _ecar(options, options.resolution)[0], _dit(options, options.resolution)
    peer_settings = dict(zip(options.peer_steps, _euler(options), strict=True))
    flops = {name: flops_per_image(ours, settings) for name, settings in _settings(options).items()}
    flops |= {f"dit {n} steps": flops_per_image(peer, settings) for n, settings in peer_settings.items()}
    record: dict[str, Any] = {
        "parameters": count_parameters(ours, peer),
        "guided": "all channels on both sides (the published DiT guides three of four)" if options.guidance else None,
        "sampling_memory_bytes": {
            "ecar": sampling_memory(ours, _settings(options)["ecar"], options.batch, torch_dtype(options.dtype)),
            "dit": sampling_memory(peer, _euler(options)[0], options.batch, torch_dtype(options.dtype)),
        },
        "flops_per_image": flops,
        "decoder": {},
        "measured": [],
        "ratios": [],
    }
    if not options.repeats:
        record["ratios"] = [_flop_ratio(options, name, steps, flops) for name in flops for steps in options.peer_steps
                            if name.startswith("ecar")]  # fmt: skip
        return record
    sides = _sides(options, peer_settings[options.peer_steps[0]], device)
    for batch in options.batch:
        measured = compare(sides, batch, options.repeats)
        record["measured"].append(measured)
        decoders: dict[str, Any] = {}
        if options.decoder != "none":
            plain = [side for side in sides if side.name in ("ecar", "dit")]
            decoders = {side.name: decoder_cost(options.decoder, side, batch, options.resolution) for side in plain}
            record["decoder"][f"batch {batch}"] = decoders
        record["ratios"] += _ratios(options, batch, measured, flops, decoders)
    return record


def _sides(options: Options, peer_settings: SamplingConfig, device: str) -> list[Side]:
    """Both systems in every variant (named "ecar", "ecar compiled", ...), and ECAR at the curve's step counts."""
    dtype, sides = torch_dtype(options.dtype), []
    config, settings = _ecar(options, options.resolution)
    for variant in _variants(options):
        ours = make_side(f"ecar{variant}", config, settings, dtype=dtype, device=device)
        peer = make_side(
            f"dit{variant}", _dit(options, options.resolution), peer_settings, dtype=dtype, device=device,
            run_steps=options.peer_run_steps,
        )  # fmt: skip
        for side in (ours, peer) if variant else ():
            side.optimize(cuda_graphs=variant == " graphs")
        sides += [ours, peer]
        for name, other in _settings(options).items():
            if name != "ecar":
                sides.append(replace(ours, name=f"{name}{variant}", settings=other, run_settings=other))
    return sides


def _settings(options: Options) -> dict[str, SamplingConfig]:
    """Of ECAR, by the names of the sides: the default steps, and the curve's."""
    config, settings = _ecar(options, options.resolution)
    more = {f"ecar {text}": _steps(text, len(config.stages.sides)) for text in options.curve}
    return {"ecar": settings, **{name: replace(settings, steps=steps) for name, steps in more.items()}}


def _flop_ratio(options: Options, name: str, peer_steps: int, flops: dict[str, Any]) -> dict[str, Any]:
    """How many times fewer FLOPs than DiT's at ``peer_steps``."""
    ratio = round(flops[f"dit {peer_steps} steps"]["total"] / flops[name]["total"], 2)
    return {"ecar_steps": _settings(options)[name].steps, "dit_steps": peer_steps, "fewer_flops": ratio}


def _ratios(
    options: Options, batch: int, measured: dict[str, Any], flops: dict[str, Any], decoders: dict[str, Any]
) -> list[dict[str, Any]]:
    """How many times DiT costs what ECAR costs: each variant against the same of DiT, at each of DiT's step counts."""
    first, ratios = options.peer_steps[0], []
    for variant in _variants(options):
        dit = measured[f"dit{variant}"]["seconds_per_batch"]
        for name in _settings(options):
            ecar = measured[f"{name}{variant}"]["seconds_per_batch"]
            for steps in options.peer_steps:
                ratios.append({
                    "batch": batch,
                    "both_sides": variant.strip() or "eager",
                    **_flop_ratio(options, name, steps, flops),
                    "less_time": round(dit * steps / first / ecar, 2),
                    "less_time_than_eager_dit": round(measured["dit"]["seconds_per_batch"] * steps / first / ecar, 2),
                    **_with_decoder(flops[f"dit {steps} steps"]["total"], flops[name]["total"], dit * steps / first,
                                    ecar, decoders),
                })  # fmt: skip
    return ratios


def _with_decoder(
    dit_flops: int, ecar_flops: int, dit_seconds: float, ecar_seconds: float, decoders: dict[str, Any]
) -> dict[str, float]:
    """The ratios with an (eager) decoder on both sides, where it was measured."""
    if not decoders:
        return {}
    theirs, ours = decoders["dit"], decoders["ecar"]
    flops = (dit_flops + theirs["flops_per_image"]) / (ecar_flops + ours["flops_per_image"])
    seconds = (dit_seconds + theirs["seconds_per_batch"]) / (ecar_seconds + ours["seconds_per_batch"])
    return {"fewer_flops_with_decoder": round(flops, 2), "less_time_with_decoder": round(seconds, 2)}


def _variants(options: Options) -> tuple[str, ...]:
    """What is behind the name of a side: as it is, compiled, compiled and recorded as graphs."""
    optimized = ("", " compiled") if options.optimized else ("",)
    return (*optimized, " graphs") if options.cuda_graphs else optimized


def _steps(text: str, stages: int) -> tuple[int, ...]:
    """From 6+3+3 to (6, 3, 3); ValueError unless it is one positive number per stage."""
    try:
        steps = tuple(int(part) for part in text.split("+"))
    except ValueError:
        steps = ()
    if len(steps) != stages or min(steps) < 1:
        raise ValueError(
            f"--curve takes {stages} positive numbers, one per stage, joined by +, such as 6+3+3; got {text!r}"
        )
    return steps


def _euler(options: Options) -> list[SamplingConfig]:
    scale = 1.5 if options.guidance else 1.0
    return [SamplingConfig(steps=(n,), guidance=(scale,), solver="euler") for n in options.peer_steps]


def _check(options: Options) -> None:
    if options.decoder not in ("none", "kl", "tiny"):
        raise ValueError(f"--decoder must be none, kl or tiny, got {options.decoder!r}")
    check_dtype(options.dtype)
    if not options.batch or not options.peer_steps:
        raise ValueError("--batch and --peer-steps need one number at least")
    factors = options.factor, options.peer_factor, options.peer_patch
    counts = options.peer_run_steps, options.classes, options.resolution, options.stages
    if options.repeats < 0:
        raise ValueError(f"--repeats must be at least 0, got {options.repeats}")
    if min((*options.batch, *options.peer_steps, *counts, *factors)) < 1:
        raise ValueError(
            "--resolution, --stages, --batch, --peer-steps, --peer-run-steps, --classes, --factor, --peer-factor and "
            "--peer-patch must be at least 1"
        )
    for name, factor in (("--factor", options.factor), ("--peer-factor", options.peer_factor)):
        if options.decoder != "none" and factor.bit_count() != 1:
            raise ValueError(f"{name} must be a power of two with --decoder, got {factor}")
    for text in options.curve:
        _steps(text, options.stages)
    _check_useful(options)
    if options.resolution % options.factor or options.resolution % (options.peer_factor * options.peer_patch):
        raise ValueError(f"--resolution {options.resolution} does not divide by the latents' factors")


def _check_useful(options: Options) -> None:
    """ValueError for options that would do nothing beside others."""
    if not options.guidance and (options.distilled or options.guide_last):
        raise ValueError("--no-guidance leaves nothing to --distilled and --guide-last: leave these out")
    if options.distilled and options.guide_last:
        raise ValueError("--distilled takes no guidance pass in any stage: leave out --guide-last")
    if not options.repeats and (options.optimized or options.cuda_graphs or options.decoder != "none"):
        raise ValueError("--repeats 0 measures nothing: leave out --optimized, --cuda-graphs and --decoder")


def _check_tools(options: Options, device: str) -> None:
    """ValueError for what ``device`` cannot do, and for packages and compilers that are missing."""
    if options.cuda_graphs and not device.startswith("cuda"):
        raise ValueError(f"--cuda-graphs needs a CUDA device, and this runs on {device}")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; install it with: pip install matplotlib")
    if options.optimized and device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError("--optimized compiles, which on CPU needs g++; install it, or name another compiler in CXX")


def _ecar(options: Options, resolution: int) -> tuple[ModelConfig, SamplingConfig]:
    """ECAR at ``resolution``: each doubling adds a finer stage."""
    side = resolution // options.factor
    stages = options.stages + max(0, (resolution // options.resolution).bit_length() - 1)
    config = preset_config(
        options.preset, latent=(side, side), stages=stages, channels=options.channels,
        classes=options.classes, image=(resolution, resolution),
    )  # fmt: skip
    steps = options.steps or default_steps(stages)
    if options.steps:
        steps = steps * stages if len(steps) == 1 else steps + steps[-1:] * (stages - options.stages)
    scale = 1.5 if options.guidance and not options.distilled else 1.0
    guidance = (scale,) * stages if options.guide_last else coarse_guidance(scale, stages)
    settings = SamplingConfig(steps=steps, guidance=guidance, solver="ab2")
    check_settings(settings, stages)
    return config, settings


def _dit(options: Options, resolution: int) -> ModelConfig:
    side = resolution // options.peer_factor
    return preset_config(
        f"dit-{options.preset}/{options.peer_patch}", latent=(side, side), stages=1, channels=options.peer_channels,
        classes=options.classes, image=(resolution, resolution),
    )  # fmt: skip


def _print_table(record: dict[str, Any]) -> None:
    distilled = " (distilled)" if record["command"]["distilled"] else ""
    for ratio in record["ratios"]:
        how = f"batch {ratio['batch']}, both {ratio['both_sides']}, " if "batch" in ratio else ""
        time = f", {ratio['less_time']}x less time" if "batch" in ratio else ""
        print(
            f"{how}ECAR{distilled} at {ratio['ecar_steps']} steps, DiT at {ratio['dit_steps']}: "
            f"{ratio['fewer_flops']}x fewer FLOPs{time}"
        )
    for name, rows in record["by_resolution"].items():
        costs = ", ".join(f"{row['resolution']}: {row['total_flops'] / 1e12:.3g}" for row in rows["rows"])
        print(f"{name}, TFLOP by resolution: {costs}; FLOPs grow as tokens to the power {rows['exponent']}")


if __name__ == "__main__":
    main()
