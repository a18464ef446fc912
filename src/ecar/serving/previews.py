"""When a growing image is shown: points (stage, step) at which a preview is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Point = tuple[int, int]  # stage from 0, solver steps of it that are done


def preview_points(steps: Sequence[int], count: int) -> tuple[Point, ...]:
    """``count`` points before the end, in order; fewer where the steps do not give that many.

    Ends of stages come first, evenly chosen. Where more are asked for than the model has stages, the longest run of
    steps without a preview is halved, the earliest first, until there are enough.

    Args:
        steps: solver steps per stage.
        count: previews wanted.
    """
    stages = len(steps)
    if count < stages:
        ends = {-(-j * stages // (count + 1)) for j in range(1, count + 1)}
        return tuple((k - 1, steps[k - 1]) for k in sorted(ends))
    starts = [sum(steps[:k]) for k in range(stages + 1)]
    marks = list(starts)
    while len(marks) < count + 2:
        gap, before = max((b - a, -a) for a, b in pairwise(marks))
        if gap < 2:
            break
        marks = sorted([*marks, -before + gap // 2])
    return tuple(_point(mark, starts) for mark in marks[1:-1])


def drawn_points(steps: Sequence[int], begin: Sequence[float], count: int) -> tuple[Point, ...]:
    """``preview_points`` among the steps that an edit draws.

    Args:
        begin: of each stage the time from which it is drawn, as of ``ecar.sampling.edit.Edit``: 1 for none of it.
    """
    known = [s if time >= 1 else min(int(time * s + 1e-6), s - 1) for s, time in zip(steps, begin, strict=True)]
    first = sum(time >= 1 for time in begin)
    if first == len(begin):
        return ()  # a strength so small that nothing is drawn
    points = preview_points([s - before for s, before in zip(steps, known, strict=True)][first:], count)
    return tuple((first + stage, known[first + stage] + step) for stage, step in points)


def _point(mark: int, starts: Sequence[int]) -> Point:
    stage = next(k for k in range(len(starts) - 1) if mark <= starts[k + 1])
    return stage, mark - starts[stage]
