"""FLOPs against resolution, from the closed formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecar.config import ModelConfig, SamplingConfig
from ecar.cost.formulas import sampling_flops
from ecar.stages import make_plan
from published import Computed

System = Callable[[int], tuple[ModelConfig, SamplingConfig]]


def cost_by_resolution(systems: Mapping[str, System], resolution: int) -> dict[str, dict[str, Any]]:
    """FLOPs per image at ``resolution`` and at twice and four times that, and the exponent over the number of tokens
    (all stages): 1 is linear.

    Args:
        systems: resolution -> configuration and settings, by name.
        resolution: the smallest.
    """
    result = {}
    for name, system in systems.items():
        rows: list[dict[str, Any]] = []
        for side in (resolution, 2 * resolution, 4 * resolution):
            config, settings = system(side)
            parts = sampling_flops(config, settings)
            tokens = sum(stage.tokens for stage in make_plan(config.stages)) // config.patch**2
            total = sum(parts["trunk"] + parts["head"])
            rows.append({"resolution": side, "tokens": tokens, "steps": settings.steps, "total_flops": total})
        first, last = rows[0], rows[-1]
        growth = math.log(last["total_flops"] / first["total_flops"]) / math.log(last["tokens"] / first["tokens"])
        result[name] = {"rows": rows, "exponent": round(growth, 3)}
    return result


def draw_costs(costs: dict[str, dict[str, Any]], peers: Sequence[Computed], path: Path) -> None:
    """A plot of ``cost_by_resolution``, with ``peers`` as points at 256."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for name, rows in costs.items():
        x, y = zip(*((row["resolution"], row["total_flops"] / 1e12) for row in rows["rows"]), strict=True)
        steps = "+".join(map(str, rows["rows"][0]["steps"]))
        axis.plot(x, y, "o-", label=f"{name}, {steps} steps: exponent {rows['exponent']}")
    height = 0.0
    for peer in sorted(peers, key=lambda peer: peer.total):
        cost = peer.total / 1e12
        height = max(cost, 1.2 * height)  # labels of equal costs stand above each other
        axis.plot([256], [cost], "k_", markersize=12)
        axis.annotate(
            f"{peer.name} ({peer.sampling})", (258, cost), (272, height), fontsize=6, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4},
        )  # fmt: skip
    ticks = [row["resolution"] for row in next(iter(costs.values()))["rows"]]
    axis.set(xscale="log", yscale="log", xlabel="side of the image in pixels", ylabel="TFLOP per image, no decoder")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
