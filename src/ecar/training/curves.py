"""Pictures of the loss, per stage: against t, where a wrong stage coupling shows (a spike at t = 0), and against steps,
where overfitting shows (the held-out loss rises)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecar.training.engine.log import read_log

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
        lines = [(centres, values, "-", k, f"stage {k + 1}") for k, values in enumerate(means.tolist())]
        _plot(run / "loss_vs_t.png", lines, f"t within the stage (0 noise, 1 data), step {step}")


def plot_losses(run: Path, names: tuple[str, ...]) -> None:
    """Write ``loss.png`` from the log, where matplotlib is installed: losses ``names`` against steps, and beside each,
    dashed, what the log has as ``val_NAME``."""
    records, lines = read_log(run), []
    for index, name in enumerate(names):
        for key, style, what in ((name, "-", "training"), (f"val_{name}", "--", "held-out")):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                lines.append((*zip(*points, strict=True), style, index, f"stage {index + 1}, {what}"))
    _plot(run / "loss.png", lines, "step")


def _plot(path: Path, lines: Sequence[tuple[Any, ...]], xlabel: str) -> None:
    """Lines of x, y, style, number of the colour and label, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: no {path.name}", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for x, y, style, colour, label in lines:
        axes.plot(x, y, style, color=f"C{colour}", label=label)
    axes.set(xlabel=xlabel, ylabel="velocity error / variance", ylim=(0, None))
    if lines:
        axes.legend()
    figure.savefig(path, dpi=100)
