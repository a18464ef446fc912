"""A picture of the loss of each stage against steps, where overfitting shows: the held-out loss rises."""

from __future__ import annotations

import sys
from pathlib import Path

from ecar.training.engine.log import read_log


def plot_losses(run: Path, names: tuple[str, ...]) -> None:
    """Write ``loss.png`` from the log, where matplotlib is installed: losses ``names`` against steps, and beside each,
    dashed, what the log has as ``val_NAME``."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no loss.png", file=sys.stderr)
        return
    records, figure = read_log(run), Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        for key, style, what in ((name, "-", "training"), (f"val_{name}", "--", "held-out")):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                label = f"stage {index + 1}, {what}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=label)
    axes.set(xlabel="step", ylabel="velocity error / variance", ylim=(0, None))
    if axes.lines:
        axes.legend()
    figure.savefig(run / "loss.png", dpi=100)
