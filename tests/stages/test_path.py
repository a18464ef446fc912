"""Eq. 1-5: closed forms and laws."""

from __future__ import annotations

import math

import pytest
import torch

from ecar.config import StageConfig
from ecar.stages import (
    data_from_end,
    down,
    end_point,
    interpolate,
    jump,
    low_band,
    make_plan,
    noises,
    pyramid,
    start_level,
    start_point,
    to_map,
    to_tokens,
    up,
    velocity_std,
)

PLAN = make_plan(StageConfig(sides=((2, 3), (4, 6), (8, 12)), ends=(0.7, 0.8, 1.0), rho=0.7))


def fresh(batch: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 1, *s.side, generator=generator, dtype=torch.float64) for s in PLAN]


def test_down_undoes_up_and_low_band_is_a_projection() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(down(up(x)), x)
    assert torch.allclose(low_band(low_band(x)), low_band(x), atol=1e-6)


def test_tokens_to_map_is_the_inverse_also_where_not_square() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(to_map(to_tokens(x), (4, 6)), x)
    assert torch.equal(to_tokens(x)[:, 7], x[:, :, 1, 1])  # row by row: position 7 of a width of 6 is row 1, column 1


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.7, 1.0])
def test_every_noise_map_has_unit_variance_and_uncorrelated_entries(rho: float) -> None:
    plan = make_plan(StageConfig(sides=((2, 2), (4, 4)), ends=(0.8, 1.0), rho=rho))
    generator = torch.Generator().manual_seed(1)
    e = [torch.randn(200_000, 1, *s.side, generator=generator) for s in plan]
    for n in noises(plan, e):
        covariance = torch.cov(n.flatten(1).T)
        assert torch.allclose(covariance, torch.eye(len(covariance)), atol=0.015)


def test_start_level_makes_the_noise_shares_of_jump_and_start_equal() -> None:
    for stage, before in zip(PLAN[1:], PLAN, strict=False):
        assert stage.start == start_level(before.end, 0.7)
        assert stage.jump * (1 - before.end) == pytest.approx((1 - stage.start) * stage.rho / 2)


def test_jump_equals_start_sample_by_sample_when_it_reuses_the_noise() -> None:
    """Eq. 5 fed the same fresh noise gives Eq. 2 exactly: this is stronger than equality in law."""
    e = fresh(4)
    z = pyramid(torch.randn(4, 1, 8, 12, dtype=torch.float64), 3)
    n = noises(PLAN, e)
    for k in (1, 2):
        y = end_point(PLAN[k - 1], z[k - 1], n[k - 1])
        assert torch.allclose(jump(PLAN[k], y, e[k]), start_point(PLAN[k], z[k], n[k]), atol=1e-12)


def test_jump_with_fresh_noise_has_mean_and_covariance_of_start() -> None:
    """Eq. 5 equals Eq. 2 in law: for fixed data both are Gaussian, so mean and covariance say all."""
    plan = make_plan(StageConfig(sides=((1, 1), (2, 2)), ends=(0.8, 1.0), rho=0.7))
    generator = torch.Generator().manual_seed(2)
    z2 = torch.tensor([[[[1.0, -2.0], [0.5, 3.0]]]]).expand(300_000, -1, -1, -1)
    e1, e2, e3 = (torch.randn(300_000, 1, s, s, generator=generator) for s in (1, 2, 2))
    n1, n2 = noises(plan, [e1, e2])
    sampled = jump(plan[1], end_point(plan[0], down(z2), n1), e3).flatten(1)
    trained = start_point(plan[1], z2, n2).flatten(1)
    assert torch.allclose(sampled.mean(0), trained.mean(0), atol=0.01)
    assert torch.allclose(torch.cov(sampled.T), torch.cov(trained.T), atol=0.01)


def test_path_ends_at_start_and_end_and_velocity_joins_them() -> None:
    e, z = noises(PLAN, fresh(2)), pyramid(torch.randn(2, 1, 8, 12, dtype=torch.float64), 3)
    for stage, zk, n in zip(PLAN, z, e, strict=True):
        t0, t1 = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        at0, at1 = interpolate(stage, zk, n, t0), interpolate(stage, zk, n, t1)
        assert torch.allclose(at0.x, start_point(stage, zk, n))
        assert torch.allclose(at1.x, end_point(stage, zk, n))
        assert torch.allclose(at0.x + at0.velocity, at1.x)


def test_one_stage_is_plain_flow_matching() -> None:
    (stage,) = make_plan(StageConfig(sides=((4, 4),), ends=(1.0,)))
    z, n, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3)
    sample = interpolate(stage, z, n, t)
    time = t.view(-1, 1, 1, 1)
    assert torch.allclose(sample.x, (1 - time) * n + time * z, atol=1e-6)
    assert torch.allclose(sample.velocity, z - n)


def test_velocity_std_closed_form_matches_a_sample() -> None:
    e, z = noises(PLAN, fresh(4000)), pyramid(2 * torch.randn(4000, 1, 8, 12, dtype=torch.float64), 3)
    for stage, zk, n in zip(PLAN, z, e, strict=True):
        v = interpolate(stage, zk, n, torch.zeros(4000, dtype=torch.float64)).velocity
        assert velocity_std(stage, zk) == pytest.approx(float(v.square().mean().sqrt()), rel=0.02)


def test_data_from_end_inverts_the_end_point() -> None:
    """A preview shows z_k, not the noisy y_k."""
    e, z = noises(PLAN, fresh(2)), pyramid(torch.randn(2, 1, 8, 12, dtype=torch.float64), 3)
    for stage, zk, n in zip(PLAN[:-1], z, e, strict=False):
        v = interpolate(stage, zk, n, torch.ones(2, dtype=torch.float64)).velocity
        assert torch.allclose(data_from_end(stage, end_point(stage, zk, n), v), zk, atol=1e-9)


def test_full_noise_reuse_is_the_pyramidal_flow_level() -> None:
    """rho = 1: a = b / (2 - b), Pyramid Flow's 2s / (1 + s) with noise share s = 1 - b counted from the other end."""
    assert start_level(0.5, 1.0) == pytest.approx(0.5 / 1.5)
    assert start_level(0.8, 0.0) == 0.0 and not math.isnan(start_level(0.8, 0.0))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sides": ((4, 4), (6, 6))}, "double"),
        ({"sides": ()}, "at least one"),
        ({"ends": (0.8, 0.9)}, "last at 1"),
        ({"ends": (1.0,)}, "one entry per stage"),
        ({"rho": 1.5}, "rho"),
        ({"sides": ((2, 2), (4, 4), (8, 8)), "ends": (0.9, 0.3, 1.0)}, "cannot end at 0.3"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        StageConfig(**changes)  # type: ignore[arg-type]


def test_latent_side_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        StageConfig.for_latent((6, 8), 3)
