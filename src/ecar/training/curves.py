"""Loss against t, per stage: how a wrong stage coupling shows (a spike at t = 0)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

BINS = 25


class LossCurves:
    """Mean loss of each stage in bins of t, since the last ``save``."""

    def __init__(self, stages: int, device: str = "cpu") -> None:
        # On the device: to fetch losses would wait for it in every step.
        self.sums, self.counts = (torch.zeros(stages, BINS, device=device) for _ in range(2))

    def add(self, stage: int, times: Tensor, losses: Tensor) -> None:
        """Times and losses, both (B,), of one stage."""
        bins = (times.detach() * BINS).long().clamp_max(BINS - 1)
        self.sums[stage].index_add_(0, bins, losses.detach().float())
        self.counts[stage].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))

    def save(self, run: Path, step: int) -> None:
        """Write ``loss_vs_t.json`` and, where matplotlib is installed, ``loss_vs_t.png``; then start again."""
        counts = self.counts.cpu()
        means = self.sums.cpu() / counts.clamp_min(1)
        centres = [(i + 0.5) / BINS for i in range(BINS)]
        record = {"step": step, "t": centres, "loss": means.tolist(), "count": counts.tolist()}
        (run / "loss_vs_t.json").write_text(json.dumps(record) + "\n")
        self.sums.zero_()
        self.counts.zero_()
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("matplotlib is not installed: loss_vs_t.json without a picture", file=sys.stderr)
            return
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for index, values in enumerate(means):
            axes.plot(centres, values, label=f"stage {index + 1}")
        axes.set(xlabel="t within the stage (0 noise, 1 data)", ylabel="velocity error / variance", ylim=(0, None))
        axes.set_title(f"loss against t at step {step}")
        axes.legend()
        figure.savefig(run / "loss_vs_t.png", dpi=100)
