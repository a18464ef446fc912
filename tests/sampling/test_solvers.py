"""Solvers by closed forms; guidance by its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ecar.sampling.guidance import guide, guide_halves
from ecar.sampling.solvers import SOLVERS, get_solver, uniform_grid


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_constant_velocity_is_integrated_exactly(name: str, steps: int) -> None:
    x, v = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.allclose(get_solver(name)(lambda _x, _t: v, x, uniform_grid(steps)), x + v, atol=1e-6)


def test_adams_bashforth_is_second_order_and_euler_first() -> None:
    """dx/dt = x from 1: the error falls 4x (2x) when the steps double."""

    def error(name: str, steps: int) -> float:
        x = get_solver(name)(lambda x, _t: x, torch.ones(1, dtype=torch.float64), uniform_grid(steps))
        return abs(float(x) - math.e)

    assert error("euler", 64) / error("euler", 128) == pytest.approx(2, rel=0.05)
    assert error("ab2", 64) / error("ab2", 128) == pytest.approx(4, rel=0.1)
    assert error("heun", 64) < error("euler", 64) / 2


def test_evaluations_are_counted_as_documented() -> None:
    """A step count is not an evaluation count: Heun evaluates twice a step and once in the last."""

    def evaluations(name: str) -> int:
        times: list[float] = []

        def velocity(x: Tensor, t: float) -> Tensor:
            times.append(t)
            return x

        get_solver(name)(velocity, torch.ones(1), uniform_grid(4))
        return len(times)

    assert [evaluations(n) for n in ("euler", "ab2", "heun")] == [4, 4, 7]


def test_unknown_solver_and_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="euler, heun, ab2"):
        get_solver("rk45")
    with pytest.raises(ValueError, match="at least 1"):
        uniform_grid(0)


def test_guidance_of_one_is_off_and_of_zero_unconditional() -> None:
    c, u = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.allclose(guide(c, u, 1.0), c) and torch.equal(guide(c, u, 0.0), u)
    assert torch.allclose(guide_halves(torch.cat([c, u]), 2.0), 2 * c - u)
