"""Solvers of dx/dt = velocity(x, t) on a time grid. They know callables, not a network.

After each step from ``now`` to ``then``, ``after(x, now, then)`` may change the point: editing holds what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
AfterStep = Callable[[Tensor, float, float], Tensor]


class Solver(Protocol):
    """From the point at the first time of the grid to the point at the last."""

    def __call__(self, velocity: Velocity, x: Tensor, grid: Sequence[float], after: AfterStep = ...) -> Tensor: ...


def uniform_grid(steps: int) -> list[float]:
    """0 = t_0 < ... < t_steps = 1, equal steps."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [i / steps for i in range(steps + 1)]


def unchanged(x: Tensor, now: float, then: float) -> Tensor:
    """The point as the step left it."""
    del now, then
    return x


def euler(velocity: Velocity, x: Tensor, grid: Sequence[float], after: AfterStep = unchanged) -> Tensor:
    """First order; one evaluation a step. Exact where the velocity is constant along the path."""
    for now, then in pairwise(grid):
        x = after(x + (then - now) * velocity(x, now), now, then)
    return x


def heun(velocity: Velocity, x: Tensor, grid: Sequence[float], after: AfterStep = unchanged) -> Tensor:
    """Second order; two evaluations a step, one in the last (its end point may be singular, as in 2206.00364)."""
    for index, (now, then) in enumerate(pairwise(grid)):
        v = velocity(x, now)
        ahead = x + (then - now) * v
        if index + 2 == len(grid) and len(grid) > 2:
            return after(ahead, now, then)
        x = after(x + (then - now) / 2 * (v + velocity(ahead, then)), now, then)
    return x


def adams_bashforth2(velocity: Velocity, x: Tensor, grid: Sequence[float], after: AfterStep = unchanged) -> Tensor:
    """Second order, multistep: one evaluation a step, the last one remembered. The first step is Euler's."""
    before: tuple[Tensor, float] | None = None
    for now, then in pairwise(grid):
        v = velocity(x, now)
        direction = v
        if before is not None:
            direction = v + (then - now) / (2 * before[1]) * (v - before[0])
        x = after(x + (then - now) * direction, now, then)
        before = (v, then - now)
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "ab2": adams_bashforth2}


def get_solver(name: str) -> Solver:
    """The solver of that name; ValueError lists the names."""
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
