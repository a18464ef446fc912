"""Quality against cost with candidates, of several systems, from the lines of benchmarks/candidates.py.

    python benchmarks/candidates_plot.py --system "ECAR" ecar.jsonl --system "DiT, 10 steps" dit_10.jsonl --out plot.png

Lines with acceptance are a curve of their own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_METRICS = ("FD-EffNetLite0", "KID x 1000")
_TICKS = (1, 2, 4, 8, 16, 32)


def read(systems: list[list[str]]) -> dict[str, list[dict[str, Any]]]:
    """Lines by name of the system, by cost; those with acceptance are a curve of their own, from one candidate on.

    Raises:
        ValueError: lines that count other images, or choose among them otherwise.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, *files in systems:
        lines = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
        plain = [line for line in lines if line.get("acceptance") is None]
        found.setdefault(name, []).extend(plain)
        if accepted := [line for line in lines if line.get("acceptance") is not None]:
            one = [line for line in plain if line["candidates"] == 1]
            found.setdefault(f"{name}, until one is accepted", []).extend(one + accepted)
    everything = [line for lines in found.values() for line in lines]
    for key in ("num", "power"):
        if len(values := {line[key] for line in everything}) > 1:
            raise ValueError(f"lines of different {key} ({values}) cannot be compared")
    return {name: sorted(lines, key=lambda line: line["flops_per_image"]) for name, lines in found.items()}


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", nargs="+", action="append", required=True, help="name and files of lines")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        systems = read(options.system)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    figure, axes = plt.subplots(1, len(_METRICS), figsize=(10, 4), constrained_layout=True)
    for axis, metric in zip(axes, _METRICS, strict=True):
        for name, lines in systems.items():
            costs, values = [line["flops_per_image"] / 1e9 for line in lines], [line[metric] for line in lines]
            axis.plot(costs, values, marker="o", label=name)
            for cost, value, line in zip(costs, values, lines, strict=True):
                axis.annotate(
                    f"{line.get('drawn', line['candidates']):.2g}",
                    (cost, value),
                    textcoords="offset points",
                    xytext=(4, 5),
                )
        axis.set(xscale="log", xlabel="GFLOP an image, all candidates and the critic", ylabel=metric)
        axis.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(systems))
    num = next(iter(systems.values()))[0]["num"]
    figure.suptitle(
        f"So many candidates for an image, on average (numbers at the points); {num:,} images. Lower is better."
    )
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
