"""Options of the run machinery, whatever is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecar.files.options import flag, option


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run: how long, where, and what it writes."""

    out: str = option(free=True)
    """Folder of the run. The same command again resumes."""
    config: str | None = option(None, free=True)
    """Recipe with options (TOML), such as the recipe.toml of another run; flags win over it."""
    max_steps: int = option(10_000, free=True)
    """Optimizer steps."""
    batch_size: int = 128
    """Images per step, over all processes."""
    seed: int = 0
    """Seed of weights, data order, noise and times."""
    device: str = option("auto", free=True)
    """Device to train on: auto (cuda where there is one), cpu, cuda, mps."""
    compile: bool = option(False, free=True)
    """torch.compile: a minute or two to start, then faster."""
    save_every: int = option(1000, free=True)
    """Steps between checkpoints, and between grids of samples."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**53:
            raise ValueError(f"--seed must be in 0..2^53-1, got {self.seed}")

    @property
    def log_every(self) -> int:
        """Steps between log lines: 50, and a hundred lines at least."""
        return max(1, min(50, self.max_steps // 100))


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Numbers and memory: how a step is computed, not what it computes."""

    dtype: str = option("bf16", free=True)
    """Autocast: bf16 (fp32 all the same on devices that only imitate it) or fp32. Loss and head output are float32."""
    accumulate: int = option(1, free=True)
    """Cut each process's part of the batch into this many micro-batches, one after the other: same step, less memory.
    """
    parallel: str = option("ddp", free=True)
    """Over several processes: ddp (each has the whole model) or fsdp (each has a slice; adamw only)."""

    def __post_init__(self) -> None:
        if self.dtype not in ("bf16", "fp32"):
            raise ValueError(f"--dtype must be bf16 or fp32, got {self.dtype!r}")
        if self.accumulate < 1:
            raise ValueError(f"--accumulate must be at least 1, got {self.accumulate}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"--parallel must be ddp or fsdp, got {self.parallel!r}")


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """The optimizer and its learning rate."""

    optimizer: str = "adamw"
    """adamw, or muon (matrices of the blocks, or hidden convolutions, by Muon, the rest by AdamW)."""
    lr: float = option(1e-3, free=True)
    """Peak learning rate (Muon's updates are scaled to AdamW's), after a warm-up of 200 steps or a tenth of all: flat,
    then linear to 2%."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"--optimizer must be adamw or muon, got {self.optimizer!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(RateOptions):
    """The optimizer, its learning rate and the averages of the weights."""

    decay: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls."""
    ema: tuple[float, ...] = (0.99,)
    """Decay of the weight average that is sampled and shipped; further ones are averages that are saved beside it, as
    final_ema_DECAY. The learning rate falls to 2%, which averages too: keep 1 / (1 - decay) far below the steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"--decay must be in [0, 1], got {self.decay}")
        if isinstance(self.ema, float | int):  # one number stands for itself
            object.__setattr__(self, "ema", (float(self.ema),))
        if not self.ema or len(set(self.ema)) < len(self.ema) or any(not 0 <= d < 1 for d in self.ema):
            raise ValueError(f"--ema takes different decays in [0, 1), got {self.ema}")
