"""Computed peers: their parameters are the published ones, their FLOPs those that others counted."""

from __future__ import annotations

import pytest

from ecar.benchmark.peers import published, sit

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


def test_sit_is_dit_at_119_billion_multiply_accumulates_a_pass() -> None:
    assert sit(250).total / 2 / 500 == pytest.approx(118.6e9, rel=0.01)
