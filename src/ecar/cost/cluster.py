"""A training run on many devices, before it exists: time, memory, network, storage, checkpoints, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ecar.config import ModelConfig

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs.
FAILURES_PER_DEVICE_HOUR = 419 / (54 * 24 * 16_384)


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Where a run is to take place.

    Attributes:
        devices: how many, each with ``tflops`` reached in practice (10^12 FLOP/s).
        parallel: ddp (a whole copy each) or fsdp (weights, gradients, optimizer and average split over all).
        batch: images of one pass on one device; ``accumulate`` passes make an update.
        images, epochs: size and passes of the data set.
        storage_gbs: GB/s at which a checkpoint is written.
        save_minutes, restart_minutes: between checkpoints; to notice a failure and start again.
    """

    devices: int
    tflops: float
    parallel: str
    batch: int
    accumulate: int
    images: int
    epochs: float
    storage_gbs: float
    save_minutes: float
    restart_minutes: float

    def __post_init__(self) -> None:
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"--parallel must be ddp or fsdp, got {self.parallel!r}")
        positive = self.accumulate, self.storage_gbs, self.save_minutes
        if not all(0 < value < math.inf for value in positive) or not 0 <= self.restart_minutes < math.inf:
            raise ValueError(
                "--accumulate, --storage-gbs, --save-minutes must be positive numbers, --restart-minutes at least 0"
            )


def cluster(
    config: ModelConfig, plan: ClusterPlan, *, parameters: int, activations: int, flops_per_image: int,
    share: Sequence[float],
) -> dict[str, object]:  # fmt: skip
    """The record of a run; bytes, seconds, and per second.

    Args:
        parameters: weights of the model.
        activations: bytes that the loss of ``plan.batch`` images keeps for its backward pass.
        flops_per_image: of training.
        share: of the images that train each stage.
    """
    rate = 1e12 * plan.tflops * plan.devices / flops_per_image
    seconds = plan.images * plan.epochs / rate
    update = plan.batch * plan.accumulate * plan.devices / rate
    tokens = sum(part * h * w for part, (h, w) in zip(share, config.stages.sides, strict=True)) / config.patch**2
    depth, (height, width) = config.trunk_depth + config.head_depth, config.stages.sides[-1]
    # Recomputed: the float32 input of every block stays, and what one block keeps.
    kept = round(4 * plan.batch * tokens * config.width * depth) + activations // depth
    slices = plan.devices if plan.parallel == "fsdp" else 1
    states = 20 * parameters // slices
    alone = (plan.devices - 1) / plan.devices
    # Slices are gathered twice and reduced in each pass; whole gradients are reduced (there and back) once an update.
    passes = 3 * plan.accumulate if plan.parallel == "fsdp" else 2
    traffic = round(passes * alone * 4 * parameters)
    # Behind the backward passes; whole gradients are complete, and travel, in the last one only.
    hidden = update * 2 / 3 / (1 if plan.parallel == "fsdp" else plan.accumulate)
    checkpoint, latent = 16 * parameters, 2 * 2 * config.channels * height * width
    failures = FAILURES_PER_DEVICE_HOUR * plan.devices * seconds / 3600
    lost = 60 * (plan.save_minutes / 2 + plan.restart_minutes)
    write = checkpoint / (1e9 * plan.storage_gbs)
    return {
        "global_batch": plan.batch * plan.accumulate * plan.devices,
        "images_per_second": round(rate, 1),
        "tokens_per_second": round(rate * tokens),
        "seconds_per_update": round(update, 4),
        "days": round(seconds / 86_400, 3),
        "device_hours": round(plan.devices * seconds / 3600, 1),
        "memory_per_device_bytes": {
            "weights, gradients, optimizer, average": states,
            "activations": activations,
            "activations, blocks recomputed": kept,
            "total": states + activations,
            "total, blocks recomputed": states + kept,
        },
        "network_bytes_per_device_per_update": traffic,
        "network_gbs_to_hide_it": round(traffic / hidden / 1e9, 3),
        "checkpoint_bytes": checkpoint,
        "checkpoint_seconds": {"blocking": round(write, 2), "share_of_time": round(write / 60 / plan.save_minutes, 5)},
        "latents": {
            "bytes": latent * plan.images * 2,  # mean and deviation in float16, both flips
            "read_bytes_per_second": round(latent * rate),
        },
        "failures": {
            "expected": round(failures, 3),
            "seconds_lost_each": round(lost),
            "share_of_time": round(failures * lost / seconds, 6),
        },
    }
