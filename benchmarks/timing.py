"""Time ECAR against DiT in one process: both sides built, warmed up, then measured in turns. Weights are random."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from common import seconds_of
from ecar.baselines.dit import DiT
from ecar.config import ModelConfig, SamplingConfig
from ecar.cost.flops import flop_counter
from ecar.cost.formulas import sampling_flops
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.sampling.optimize import optimize

_HEAD_CALLS = ("forward", "conditionings", "embed_tokens")


@dataclass(frozen=True)
class Side:
    """One system: its model, how it samples, and how many of its steps are really run.

    Attributes:
        scale: solver steps asked for / steps run. A step of DiT costs the same at any time, so few are run and the
            seconds multiplied; 1 where all are run.
    """

    name: str
    model: StageModel
    settings: SamplingConfig
    run_settings: SamplingConfig
    scale: float

    def optimize(self, cuda_graphs: bool) -> None:
        """Compile the blocks, and hold the head's passes as CUDA graphs where asked."""
        optimize(self.model, compile=True, cuda_graphs=cuda_graphs)


def flops_per_image(config: ModelConfig, settings: SamplingConfig) -> dict[str, Any]:
    """Per image, guidance counted, the decoder not: from the closed formulas."""
    parts = sampling_flops(config, settings)
    total = sum(parts["trunk"] + parts["head"])
    return {**parts, "total": total, "multiply_accumulates": total // 2}


def shared_embedder_parameters(model: DiT) -> int:
    """Parameters as the paper counts them: one time and label embedder, where diffusers repeats it in every block."""
    repeated = sum(p.numel() for block in model.head.blocks[1:] for p in block.norm1.emb.parameters())
    return model.num_parameters() - repeated


def count_parameters(ours: ModelConfig, peer: ModelConfig) -> dict[str, int]:
    """Parameters of both sides; no weight is allocated. Each block of diffusers' DiT holds its own embedder of time and
    class, where the paper has one: "dit, one embedder" is the paper's count."""
    with torch.device("meta"):
        ecar, dit = build_model(ours), DiT(peer)
    counts = ecar.num_parameters(), dit.num_parameters(), shared_embedder_parameters(dit)
    return dict(zip(("ecar", "dit", "dit, one embedder"), counts, strict=True))


def make_side(
    name: str,
    config: ModelConfig,
    settings: SamplingConfig,
    *,
    dtype: torch.dtype,
    device: str,
    run_steps: int | None = None,
) -> Side:
    """A side with random weights (zero-initialised layers filled, so that no product is skipped).

    Args:
        run_steps: steps that are really run of a single-stage model; default: all.
    """
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    model = model.to(device, dtype).eval()
    if run_steps is None or run_steps >= settings.steps[0]:
        return Side(name, model, settings, settings, 1.0)
    assert len(settings.steps) == 1, "only steps of a single stage are all alike"
    run_settings, scale = replace(settings, steps=(run_steps,)), settings.steps[0] / run_steps
    return Side(name, model, settings, run_settings, scale)


def run_once(side: Side, batch: int) -> float:
    """Seconds of one batch, without the decoder, scaled to all steps."""
    model = side.model
    noise = draw_noise(list(range(batch)), model.plan, model.config.channels)
    labels = torch.arange(batch, device=model.device) % model.config.num_classes
    return seconds_of(lambda: sample_latents(model, labels, noise, side.run_settings), model.device) * side.scale


def compare(sides: list[Side], batch: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of each side, taken in turns after one warm-up, and their split."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    with tqdm(total=len(sides) * (1 + repeats), desc=f"batch {batch}", unit="run") as bar:  # compiling takes minutes
        for turn in range(1 + repeats):
            for side in sides:
                bar.set_postfix_str(side.name)
                seconds = run_once(side, batch)
                if turn:  # the first one warms up
                    times[side.name].append(seconds)
                bar.update()
    result = {}
    for side in sides:
        seconds = statistics.median(times[side.name])
        result[side.name] = {
            "batch": batch,
            "seconds_per_batch": round(seconds, 5),
            "seconds_all": [round(t, 5) for t in times[side.name]],
            "images_per_second": round(batch / seconds, 4),
            "tflops_per_second": round(
                flops_per_image(side.model.config, side.settings)["total"] * batch / seconds / 1e12, 4
            ),
            "steps": side.settings.steps,
            "steps_run": side.run_settings.steps,
            "split_seconds": {k: round(v * side.scale, 5) for k, v in split(side, batch).items()},
            "cuda_peak_memory_bytes": cuda_peak(side, batch),
        }
    return result


def split(side: Side, batch: int) -> dict[str, float]:
    """Seconds in the transformer and in the head, per stage (one more run, clocks around the calls)."""
    seconds: dict[str, float] = {}
    with _timed(side.model, seconds):
        total = run_once(side, batch) / side.scale
    return {**seconds, "rest": max(0.0, total - sum(seconds.values()))}


def decoder_cost(kind: str, side: Side, batch: int, resolution: int) -> dict[str, Any]:
    """Seconds and FLOPs of decoding the latents of a batch with a random autoencoder of diffusers.

    Args:
        kind: "kl": AutoencoderKL as in Stable Diffusion (factor 8) or LDM and MAR (factor 16); "tiny": AutoencoderTiny.
        side: its latents' channels and sides, device and type.
        batch: images.
        resolution: side of the images, pixels.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    config, model = side.model.config, side.model
    latent = config.stages.sides[-1]
    doublings = (resolution // latent[0]).bit_length() - 1
    if kind == "kl":
        few = (128, 256, 512, 512)[: doublings + 1]  # f4: three of them
        widths = (128,) * (doublings - 2) + (256, 256, 512) if doublings > 3 else few
        decoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=config.channels,
        )
    else:
        decoder = AutoencoderTiny(
            latent_channels=config.channels,
            encoder_block_out_channels=(64,) * (doublings + 1),
            decoder_block_out_channels=(64,) * (doublings + 1),
            num_encoder_blocks=(1,) * (doublings + 1),
            num_decoder_blocks=(3,) * doublings + (1,),
        )
    decoder = decoder.to(model.device, model.dtype).eval()
    z = torch.randn(batch, config.channels, *latent, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        with flop_counter() as counter:
            image = decoder.decode(z).sample
        assert image.shape[-1] == resolution, "the decoder's factor is not the side's"
        times = [seconds_of(lambda: decoder.decode(z), model.device) for _ in range(3)]
    return {
        "kind": type(decoder).__name__,
        "parameters": sum(p.numel() for p in decoder.decoder.parameters()),
        "flops_per_image": int(counter.get_total_flops()) // batch,
        "seconds_per_batch": round(statistics.median(times), 5),
    }


def cuda_peak(side: Side, batch: int) -> int | None:
    """CUDA: the most bytes allocated while one batch is made, weights of the other sides not counted; else None."""
    model = side.model
    if model.device.type != "cuda":
        return None
    others = torch.cuda.memory_allocated(model.device) - sum(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats(model.device)
    run_once(side, batch)
    return torch.cuda.max_memory_allocated(model.device) - others


@contextmanager
def _timed(model: StageModel, seconds: dict[str, float]) -> Iterator[None]:
    """Clocks around ``transformer.step`` and the head's calls; on CUDA each waits for the device, so that the parts
    add up to more than a run without clocks."""

    def clocked(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``call``, whose seconds are added up under ``name`` and the stage's number."""

        def wrapped(stage: Any, *args: Any, **kwargs: Any) -> Any:
            _synchronize(model.device)
            start = time.perf_counter()
            result = call(stage, *args, **kwargs)
            _synchronize(model.device)
            key = f"{name} {stage.index + 1}"
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start
            return result

        return wrapped

    # An ECAR's modulation is computed for all steps at once, a DiT's inside its blocks.
    places = [(model.trunk, "step", "trunk"), *((model.head, name, "head") for name in _HEAD_CALLS)]
    before = [(part, name, part.__dict__.get(name)) for part, name, _ in places]
    for part, name, shown in places:
        setattr(part, name, clocked(getattr(part, name), shown))
    try:
        yield
    finally:
        for part, name, own in before:
            delattr(part, name)
            if own is not None:  # what replays CUDA graphs
                setattr(part, name, own)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
