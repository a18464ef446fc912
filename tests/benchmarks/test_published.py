"""Computed peers: their parameters are the published ones, their FLOPs those that others counted."""

from __future__ import annotations

import pytest

from published import published, sit

MILLIONS = {
    "SiT-XL/2": 675,
    "MAR-B": 208, "MAR-L": 479, "MAR-H": 943, "VAR-d16": 310, "VAR-d20": 600, "VAR-d24": 1000, "VAR-d30": 2000,
    "FlowAR-S": 170, "FlowAR-L": 589, "FlowAR-H": 1900,
}  # fmt: skip
LAZYMAR_TERAFLOPS = {"MAR-B": 15.49, "MAR-L": 35.05, "MAR-H": 69.06}  # 64 steps, as the README of LazyMAR counts


def test_parameters_are_the_published_ones() -> None:
    assert {s.name for s in published()} == set(MILLIONS)
    for system in published():
        assert system.parameters / 1e6 == pytest.approx(MILLIONS[system.name], rel=0.06), system


def test_mar_costs_what_lazymar_counted() -> None:
    for system in published():
        if system.sampling.startswith("64 "):
            assert system.total / 1e12 == pytest.approx(LAZYMAR_TERAFLOPS[system.name], rel=0.1), system


def test_flowar_is_counted_by_evaluations_of_the_doubled_batch() -> None:
    """Its flag says 25 where its sampler evaluates 24 times, and both halves go through every one of them."""
    heads = {s.name: s for s in published() if s.name.startswith("FlowAR")}
    assert {name: s.sampling for name, s in heads.items()} == {
        "FlowAR-S": "5 x 24 steps, guided", "FlowAR-L": "5 x 24 steps, guided", "FlowAR-H": "5 x 50 steps, guided",
    }  # fmt: skip
    width, tokens, twice = 1024, sum(side**2 for side in (1, 2, 4, 8, 16)), 2
    attention = sum(side**4 for side in (1, 2, 4, 8, 16))
    per_step = 2 * (tokens * (12 + 6) * width**2 + 2 * attention * width)  # two blocks, modulated per token
    assert heads["FlowAR-S"].head_flops == pytest.approx(2 * twice * 24 * per_step, rel=1e-9)


def test_sit_is_dit_at_119_billion_multiply_accumulates_a_pass() -> None:
    assert sit(250).total / 2 / 500 == pytest.approx(118.6e9, rel=0.01)
