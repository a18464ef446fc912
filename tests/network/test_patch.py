"""Patches: a square of positions is one token, in trunk and head alike."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from conftest import random_model, tiny_config
from ecar.config import StageConfig
from ecar.network.head import Head
from ecar.stages import make_plan, to_map, to_tokens

STAGES = StageConfig(sides=((4, 6), (8, 12)), ends=(0.7, 1.0), rho=0.7)
CONFIG = tiny_config(stages=STAGES, patch=2, velocity_std=(1.1, 0.9), image_side=(16, 24), sampling=None)


def fold(x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


def test_tokens_of_patches_come_back_to_their_places() -> None:
    x = torch.randn(2, 3, 4, 6)
    tokens = to_tokens(x, 2)
    assert tokens.shape == (2, 6, 12) and torch.equal(to_map(tokens, (2, 3), 2), x)
    assert torch.equal(tokens, to_tokens(fold(x)))


def test_a_plan_of_patches_counts_tokens_and_keeps_sides() -> None:
    plan = make_plan(STAGES, 2)
    assert [s.side for s in plan] == [(4, 6), (8, 12)]
    assert [s.tokens for s in plan] == [6, 24] and plan[1].grid == (4, 6)


def test_the_head_with_patches_is_the_head_without_on_folded_maps() -> None:
    """Otherwise positions or channels within a patch would be mixed up."""
    model = random_model(CONFIG)
    folded = StageConfig(sides=((2, 3), (4, 6)), ends=(0.7, 1.0), rho=0.7)
    plain = Head(CONFIG.replace(stages=folded, patch=1, channels=4 * CONFIG.channels)).eval()
    plain.load_state_dict(model.head.state_dict())
    labels, t = torch.tensor([0, 2]), torch.tensor([0.2, 0.7])
    for stage, other in zip(model.plan, plain.plan, strict=True):
        x, tokens = torch.randn(2, 3, *stage.side), torch.randn(2, stage.tokens, CONFIG.width)
        ours = model.head(stage, x, model.head.conditioning(stage, t, labels), model.head.embed_tokens(stage, tokens))
        theirs = plain(other, fold(x), plain.conditioning(other, t, labels), plain.embed_tokens(other, tokens))
        assert ours.shape == x.shape
        torch.testing.assert_close(fold(ours), theirs)


def test_cached_steps_equal_the_masked_pass_with_patches() -> None:
    model, labels = random_model(CONFIG), torch.tensor([0, 1])
    y = [torch.randn(2, 3, 4, 6)]
    cache = model.trunk.new_cache(2, torch.device("cpu"), torch.float32)
    for stage, expected in zip(model.plan, model.trunk(y, labels), strict=True):
        stepped = model.trunk.step(stage, y[0] if stage.index else None, labels, cache)
        torch.testing.assert_close(stepped, expected, atol=1e-5, rtol=0)


def test_a_first_map_that_does_not_divide_into_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="must divide by patch 2, and the first one is 2x3"):
        tiny_config(patch=2)
