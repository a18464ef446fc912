"""Contexts that the model makes itself: the formula, its limits, gradients, resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import draws, killed_at_five, lines, options, weights
from torch import Tensor

from conftest import random_model, tiny_config
from ecar.data.order import derive_seed
from ecar.network.model import ECAR
from ecar.stages import end_point, jump, noises, pyramid
from ecar.training import build, loop
from ecar.training.config import TrainConfig
from ecar.training.draws import draw_batch
from ecar.training.loss import Draws, stage_losses
from ecar.training.on_policy import STEPS

ROWS = (6, 4, 2)


def setting(context_noise: float = 0.3) -> tuple[ECAR, Tensor, Tensor, Draws]:
    model = random_model(tiny_config(context_noise=context_noise))
    z = torch.randn(6, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    return model, z, torch.tensor([0, 1, 2, 3, 0, 1]), draws(model.plan, 6)


def with_own(d: Draws, chosen: list[bool], start: float) -> Draws:
    return dataclasses.replace(d, on_policy=torch.tensor(chosen), starts=torch.full((2, 6), start))


def test_a_run_without_it_sees_the_same_random_numbers_and_images_that_are_not_chosen_the_same_losses() -> None:
    model, z, labels, d = setting()
    plain = stage_losses(model, z, labels, d, ROWS)
    nobody = stage_losses(model, z, labels, with_own(d, [False] * 6, 0.5), ROWS)
    assert all(torch.equal(a, b) for a, b in zip(plain, nobody, strict=True))
    some = stage_losses(model, z, labels, with_own(d, [False, True] * 3, 0.5), ROWS)
    assert torch.equal(some[0], plain[0])  # the first stage reads no map
    for own, true in zip(some[1:], plain[1:], strict=True):
        assert torch.allclose(own[::2], true[::2], atol=1e-5) and (own[1::2] - true[1::2]).abs().min() > 1e-3


def test_taking_over_at_the_end_of_the_stage_is_the_teacher_forced_loss() -> None:
    model, z, labels, d = setting()
    plain = stage_losses(model, z, labels, d, ROWS)
    own = stage_losses(model, z, labels, with_own(d, [True] * 6, 1.0), ROWS)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(plain, own, strict=True))


def test_the_loss_is_that_of_the_velocity_from_the_models_own_start_to_the_true_end() -> None:
    """By hand, for one image of three stages: y^_1, then y^_2 from the jump of y^_1, read and jumped from."""
    model, z, labels, d = setting(context_noise=0.0)
    d = with_own(d, [True] * 6, 0.6)
    assert d.starts is not None
    losses = stage_losses(model, z, labels, d, (6, 6, 6))
    maps, noise, row = pyramid(z, 3), noises(model.plan, d.noise), slice(2, 3)
    read: list[Tensor] = []
    with torch.no_grad():
        for stage in model.plan:
            k = stage.index
            start = jump(stage, read[-1], d.noise[k][row]) if read else noise[0][row]
            end = end_point(stage, maps[k][row], noise[k][row])
            embedded = model.head.embed_tokens(stage, model.trunk(read, labels[row])[k])
            t = d.times[k, row]
            x = start + t.view(-1, 1, 1, 1) * (end - start)
            error = (model.velocity(stage, x, t, embedded, labels[row]) - (end - start)) / model.velocity_scale(stage)
            assert losses[k][row].item() == pytest.approx(error.square().mean().item(), rel=1e-4)
            x, step, before = start + 0.6 * (end - start), 0.4 / STEPS, None
            for i in range(STEPS):
                v = model.velocity(stage, x, torch.tensor([0.6 + i * step]), embedded, labels[row])
                x, before = x + step * (v if before is None else 1.5 * v - 0.5 * before), v
            read.append(x)


def test_no_gradient_is_lost_or_added_under_autocast() -> None:
    """Weights that autocast casts without gradients, and keeps, would silently not be trained."""
    model, z, labels, d = setting()
    grads = []
    for cached in (True, False):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            losses = stage_losses(model, z, labels, with_own(d, [True] * 6, 0.5), ROWS)
        sum(loss.mean() for loss in losses).backward()  # type: ignore[union-attr]
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None for g in grads[0].values())
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=0.1, atol=1e-2) for n in grads[0])  # type: ignore[arg-type]


def own(data: Path, out: Path, **changes: Any) -> TrainConfig:
    return options(data, out, **{"on_policy": 0.5, "on_policy_after": 0.5, "sample_every": 0, **changes})


def test_it_begins_after_its_share_of_the_steps_and_is_resumed_and_cut_into_parts_without_a_difference(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(options(digits_folder, tmp_path / "without", sample_every=0))
    loop.train(own(digits_folder, tmp_path / "whole"))
    losses = [[line["loss"] for line in lines(tmp_path / run)] for run in ("without", "whole")]
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]
    loop.train(own(digits_folder, tmp_path / "cut", accumulate=2))
    assert all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values(), strict=True)
    )
    with killed_at_five(monkeypatch):
        loop.train(own(digits_folder, tmp_path / "parts"))
    loop.train(own(digits_folder, tmp_path / "parts"))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_every_use_of_randomness_in_a_step_has_a_seed_of_its_own(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of a latent's distribution and the choice of on-policy images were once drawn from the same numbers."""
    config, seeds = own(digits_folder, tmp_path, device="cpu"), list[int]()
    table, _ = build.load_table(config)
    model = random_model(tiny_config())

    def recorded(*parts: int) -> int:
        seeds.append(derive_seed(*parts))
        return seeds[-1]

    monkeypatch.setattr("ecar.training.draws.derive_seed", recorded)
    draw_batch(config, table, model.plan[:2], 0, config.max_steps)
    assert len(seeds) == 3 == len(set(seeds))


def test_times_and_shares_are_as_asked_for(digits_folder: Path, tmp_path: Path) -> None:
    config = own(
        digits_folder, tmp_path, batch_size=2000, on_policy=0.2, on_policy_from=0.8, on_policy_after=0.0, device="cpu"
    )
    table, _ = build.load_table(config)
    plan = random_model(tiny_config()).plan
    d = draw_batch(config, table, plan, 3, 1)[2]
    again = draw_batch(config, table, plan, 3, 1)[2]
    assert d.on_policy is not None and d.starts is not None and again.starts is not None
    assert d.on_policy.float().mean().item() == pytest.approx(0.2, abs=0.03) and torch.equal(d.starts, again.starts)
    assert d.starts.shape == (2, 2000) and 0.8 <= d.starts.min() < 0.81 and d.starts.max() <= 1


@pytest.mark.parametrize("changes", [{"stages": 1}, {"prediction": "x"}, {"on_policy": 1.5}, {"on_policy_from": -1.0}])
def test_it_is_refused_where_it_means_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="on_policy"):
        TrainConfig(**{"data": "d", "out": "o", "on_policy": 0.5, **changes})
