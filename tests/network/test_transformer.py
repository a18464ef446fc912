"""Two ways: masked = cached = uncached; causality; positions."""

from __future__ import annotations

import torch

from conftest import random_model, tiny_config
from ecar.network.model import ECAR
from ecar.network.positions import coordinates, rotary_table, rotate


def ends(batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 3, *side, generator=generator) for side in ((2, 3), (4, 6))]


def test_cached_steps_equal_the_masked_pass(model: ECAR) -> None:
    y, labels = ends(2), torch.tensor([0, 3])
    masked = model.trunk(y, labels)
    cache = model.trunk.new_cache(2, torch.device("cpu"), torch.float32)
    for stage, expected in zip(model.plan, masked, strict=True):
        stepped = model.trunk.step(stage, y[stage.index - 1] if stage.index else None, labels, cache)
        assert torch.allclose(stepped, expected, atol=1e-5)


def test_masked_pass_equals_uncached_passes_over_fewer_stages(model: ECAR) -> None:
    """M_k computed from the stages before alone: nothing from later stages leaks through the mask."""
    y, labels = ends(2), torch.tensor([1, 2])
    everything = model.trunk(y, labels)
    for count in (1, 2):
        assert torch.allclose(model.trunk(y[: count - 1], labels)[-1], everything[count - 1], atol=1e-5)


def test_a_later_map_does_not_change_earlier_tokens_but_its_own(model: ECAR) -> None:
    y, labels = ends(1), torch.tensor([0])
    before = model.trunk(y, labels)
    after = model.trunk([y[0], y[1] + 1], labels)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


def test_two_interleaved_samplers_share_a_model(model: ECAR) -> None:
    """The cache is the caller's: state on the module would mix the two."""
    y, labels = ends(2), torch.tensor([0, 1])
    caches = [model.trunk.new_cache(1, torch.device("cpu"), torch.float32) for _ in range(2)]
    apart = model.trunk(y, labels)
    for stage in model.plan:
        for row in (0, 1):
            before = y[stage.index - 1][row : row + 1] if stage.index else None
            m = model.trunk.step(stage, before, labels[row : row + 1], caches[row])
            assert torch.allclose(m, apart[stage.index][row : row + 1], atol=1e-5)


def test_attention_paths_agree() -> None:
    """The explicit product for short sequences on CPU and the fused kernel are the same function."""
    from ecar.network import block

    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))
    mask = torch.rand(6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    explicit = block.attention(q, k, v, mask)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(explicit, fused, atol=1e-5)


def test_coarse_positions_stand_at_the_centre_of_the_fine_ones() -> None:
    fine, coarse = coordinates((4, 6)).view(4, 6, 2), coordinates((2, 3)).view(2, 3, 2)
    assert torch.allclose(fine.view(2, 2, 3, 2, 2).mean((1, 3)), coarse)


def test_rotary_products_depend_on_the_offset_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    table = rotary_table((4, 4), (4, 4), 8)
    score = [
        (rotate(q, table[:, i : i + 1]) * rotate(k, table[:, j : j + 1])).sum() for i, j in ((0, 5), (5, 10), (2, 7))
    ]
    assert torch.allclose(score[0], score[1], atol=1e-5) and torch.allclose(score[0], score[2], atol=1e-5)


def test_fresh_model_predicts_zero_velocity() -> None:
    """adaLN-zero and the zero output layer: training starts at a loss of one per stage."""
    torch.manual_seed(0)
    fresh = ECAR(tiny_config())
    stage = fresh.plan[1]
    tokens = fresh.head.embed_tokens(stage, torch.randn(2, stage.tokens, 16))
    v = fresh.velocity(stage, torch.randn(2, 3, *stage.side), torch.rand(2), tokens, torch.tensor([0, 1]))
    assert torch.equal(v, torch.zeros_like(v))


def test_unconditional_model_has_one_row_of_classes() -> None:
    model = random_model(tiny_config(num_classes=0, class_names=()))
    assert model.config.null_class == 0
    assert model.trunk(ends(2), torch.zeros(2, dtype=torch.long))[2].shape == (2, 96, 16)
