"""Two sets of curves (benchmarks/curve.py) side by side: a plot, a table, and what follows from them, by rule.

    python benchmarks/compare.py --ecar ecar_0.jsonl --dit dit_0.jsonl --out results/cifar10_dit --name comparison

Several files a side are seeds: figures are their mean, with the standard deviation where there are three or more.
--distilled adds the students of ECAR (ecar train --distill), a third set that is compared with DiT by itself; its files
are different students, and are not averaged. All lines must have the same number of samples, reference and extractor.
--seconds takes the times of benchmarks/seconds.py instead of the curves' own, which were taken beside other work.
For each metric: DiT's best at any setting; the cheapest ECAR setting that is no worse; and whether every DiT setting
has an ECAR setting that costs no more and is no worse (then ECAR's curve lies below DiT's).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_LARGER_IS_BETTER = "classifier_accuracy"
_TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def load(files: list[Path]) -> list[dict[str, Any]]:
    """The lines of some curves."""
    return [{**json.loads(line), "file": str(file)} for file in files for line in file.read_text().splitlines()]


def check(lines: list[dict[str, Any]]) -> None:
    """ValueError unless all lines can be compared."""
    first = next((line for line in lines if "flops" in line), lines[0])
    for line in lines:
        for key in ("num", "reference", "extractor"):
            if key == "num" and "flops" not in line:
                continue  # of the floor, there may be fewer images; its N stands in the plot
            if line[key] != first[key]:
                raise ValueError(f"{line['file']}: {key} is {line[key]}, but {first[key]} in {first['file']}")
    for key in ("judge", "decoder"):  # older curves do not have them
        values = {line[key]: line["file"] for line in lines if key in line}
        if len(values) > 1:
            raise ValueError(f"another {key} in each of these, so their figures cannot be compared: {values}")


def metrics(lines: list[dict[str, Any]]) -> dict[str, bool]:
    """metric -> is a smaller value better; the distance and KID are named after the extractor."""
    names = [k for k in lines[0] if k.startswith(("FID", "FD-", "KID x 1000 (")) or k == _LARGER_IS_BETTER]
    return {name: name != _LARGER_IS_BETTER for name in names}


def read(lines: list[dict[str, Any]], names: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """setting -> metrics (means over seeds), FLOPs and seconds per image.

    Raises:
        ValueError: a setting twice with the same weights, which are no two seeds.
    """
    result: dict[str, dict[str, Any]] = {}
    for setting in dict.fromkeys(line["setting"] for line in lines):
        group = [line for line in lines if line["setting"] == setting]
        if "flops" not in group[0]:  # floor and reconstructions: every file has them, whatever its weights
            group = list({line["weights"]: line for line in group}.values())
        if len({line["weights"] for line in group}) < len(group):
            raise ValueError(f"{group[-1]['file']}: {setting} is there twice for the same weights")
        point: dict[str, Any] = {"seeds": len(group), "num": group[0]["num"]}
        for metric in names:
            values = [line[metric] for line in group]
            point[metric] = mean(values)
            if len(values) > 2:
                point[f"{metric} std"] = stdev(values)
        if "flops" in group[0]:
            point["gflops"] = round(group[0]["flops"]["total"] / 1e9, 3)
            point["seconds"] = round(mean(line["seconds_per_image"] for line in group), 5)
            point["guided"] = any(g != 1 for g in group[0]["sampling"]["guidance"])
        result[setting] = point
    return result


def retime(points: dict[str, dict[str, Any]], seconds: dict[str, float]) -> None:
    """Times of ``benchmarks/seconds.py`` in place of the curves' own.

    Raises:
        ValueError: a setting that was not timed.
    """
    for setting, point in points.items():
        if "seconds" in point and "teacher" not in setting:
            if setting not in seconds:
                raise ValueError(f"--seconds: no time for {setting}")
            point["seconds"] = seconds[setting]


def conclusions(
    ecar: dict[str, Any], dit: dict[str, Any], metric: str, smaller: bool, guided: bool | None
) -> dict[str, Any] | None:
    """The comparison in one metric, over guided or unguided settings (None: all)."""

    def chosen(points: dict[str, Any]) -> dict[str, Any]:
        free = {k: v for k, v in points.items() if "gflops" in v and "teacher" not in k}
        return free if guided is None else {k: v for k, v in free.items() if v["guided"] == guided}

    ours, theirs, sign = chosen(ecar), chosen(dit), 1 if smaller else -1
    if not ours or not theirs:
        return None
    best = min(theirs, key=lambda k: sign * theirs[k][metric])
    good = {k: v for k, v in ours.items() if sign * v[metric] <= sign * theirs[best][metric]}
    cheapest = min(good, key=lambda k: good[k]["gflops"], default=None)
    beaten = {
        cost: [
            k for k, v in theirs.items()
            if cost in v and any(
                sign * p[metric] <= sign * v[metric] and p[cost] <= v[cost] for p in ours.values() if cost in p
            )
        ]
        for cost in ("gflops", "seconds")
    }  # fmt: skip
    ours_best = min(ours, key=lambda k: sign * ours[k][metric])
    record: dict[str, Any] = {
        "dit_best": {"setting": best, **theirs[best]},
        "ecar_best": {"setting": ours_best, **ours[ours_best]},
        "cheapest_ecar_no_worse_than_dit_best": {"setting": cheapest, **ours[cheapest]} if cheapest else None,
        "dit_settings": list(theirs),
        "dit_settings_beaten_at_no_more_flops": beaten["gflops"],
        "dit_settings_beaten_at_no_more_seconds": beaten["seconds"],
        "ecar_curve_lies_below": len(beaten["gflops"]) == len(theirs),
    }
    if cheapest is not None:
        record["flops_ratio_to_dit"] = {
            k: round(v["gflops"] / ours[cheapest]["gflops"], 1) for k, v in theirs.items() if ":" not in k
        }
    return record


def plot(
    ecar: dict[str, Any], dit: dict[str, Any], distilled: dict[str, Any], names: dict[str, bool], path: Path
) -> None:
    """Every setting as a point, the best that each cost buys as a line."""
    series = [(dit, "tab:red", "DiT"), (ecar, "tab:blue", "ECAR"), (distilled, "tab:green", "ECAR distilled")]
    series = [entry for entry in series if entry[0]]
    figure, grid = plt.subplots((len(names) + 1) // 2, 2, figsize=(11, 4 * ((len(names) + 1) // 2)), squeeze=False)
    for axis, metric in zip(grid.flat, names, strict=False):
        for points, colour, label in series:
            free = sorted((p for k, p in points.items() if "gflops" in p and "teacher" not in k), key=_cost)
            for guided, face in ((False, "none"), (True, colour)):
                chosen = [p for p in free if p["guided"] == guided]
                x, y = [p["gflops"] for p in chosen], [p[metric] for p in chosen]
                name = f"{label}{' guided' if guided else ''}"
                if chosen:
                    axis.scatter(x, y, s=18, facecolors=face, edgecolors=colour, label=name)
            axis.plot(*_frontier(free, metric, names[metric]), color=colour, alpha=0.6, drawstyle="steps-post")
        sign = 1 if names[metric] else -1
        values = sorted(
            (p[metric] for side, _, _ in series for p in side.values() if "gflops" in p), key=lambda v: sign * v
        )
        worst = values[int(0.85 * (len(values) - 1))]  # a few hopeless settings would squeeze the rest
        pad = 0.08 * abs(worst - values[0]) or 1.0  # one value alone has no range
        axis.set_ylim(*sorted((values[0] - sign * pad, worst + sign * pad)))
        for line, label, style in (("reconstruction", "reconstructions", "--"), ("floor", "real images", ":")):
            if line in ecar:  # a line where it is in sight, else its value
                axis.axhline(ecar[line][metric], color="grey", linestyle=style, linewidth=1,
                             label=f"{label} {ecar[line][metric]:.4g}, N = {ecar[line]['num']:,}")  # fmt: skip
        axis.set(xscale="log", xlabel="GFLOP per image (decoder counted)", title=metric)
        axis.set_xticks(_TICKS, [str(t) for t in _TICKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    costs = [p["gflops"] for points, _, _ in series for p in points.values() if "gflops" in p]
    for axis in grid.flat[: len(names)]:
        axis.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
    for axis in grid.flat[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _cost(point: dict[str, Any]) -> float:
    return float(point["gflops"])


def _frontier(points: list[dict[str, Any]], metric: str, smaller: bool) -> tuple[list[float], list[float]]:
    """The settings, by cost, that are better than every cheaper one; the last goes on to the right."""
    best: list[dict[str, Any]] = []
    for p in points:
        if not best or (p[metric] < best[-1][metric]) == smaller:
            best.append(p)
    end = [max(p["gflops"] for p in points)] if points else []
    return [p["gflops"] for p in best] + end, [p[metric] for p in best] + [p[metric] for p in best[-1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ecar", type=Path, nargs="+", required=True)
    parser.add_argument("--dit", type=Path, nargs="+", required=True)
    parser.add_argument("--distilled", type=Path, nargs="+", default=[])
    parser.add_argument("--seconds", type=Path, help="of benchmarks/seconds.py")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json and NAME.png")
    args = parser.parse_args()
    lines = {side: load(files) for side, files in (("ecar", args.ecar), ("dit", args.dit), ("more", args.distilled))}
    twice = [name for name, count in Counter(x["setting"] for x in lines["more"] if "flops" in x).items() if count > 1]
    try:
        check([line for side in lines.values() for line in side])
        names = metrics(lines["ecar"])
        ecar, dit, distilled = (read(side, names) for side in (
            lines["ecar"], lines["dit"], [line for line in lines["more"] if "flops" in line]
        ))  # fmt: skip
        if args.seconds is not None:
            times = json.loads(args.seconds.read_text())
            for points, side in ((ecar, "ecar"), (dit, "dit"), (distilled, "ecar")):
                retime(points, times[side])
    except ValueError as error:
        parser.error(str(error))
    if twice:
        parser.error(f"--distilled: {twice[0]} is in two files; students are not averaged, leave one out")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "ecar": ecar,
        "dit": dit,
        "conclusions": {
            kind: {metric: conclusions(ecar, dit, metric, smaller, guided) for metric, smaller in names.items()}
            for kind, guided in (("unguided", False), ("guided", True), ("any", None))
        },
    }
    if distilled:
        record["distilled"] = distilled
        record["conclusions"]["distilled"] = {
            m: conclusions(distilled, dit, m, smaller, None) for m, smaller in names.items()
        }
    (args.out / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(ecar, dit, distilled, names, args.out / f"{args.name}.png")
    print(json.dumps(record["conclusions"]))


if __name__ == "__main__":
    main()
