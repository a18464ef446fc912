"""Attention within groups: the same as a mask, reaching everywhere in two blocks, and refused where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import random_model, tiny_config, windowed_config
from ecar.cli.main import main
from ecar.config import StageConfig
from ecar.network.block import attention
from ecar.network.positions import rotary_table
from ecar.network.windows import Windows, windows_of
from ecar.pretrained.folders import load_model

SIDE, SIZE = (8, 16), 4


def groups(spread: bool) -> torch.Tensor:
    """(N,): the group of each token, from its row and column."""
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij"))
    return (rows % 2) * 4 + columns % 4 if spread else (rows // 4) * 4 + columns // 4


@pytest.mark.parametrize("spread", [False, True])
def test_attention_in_windows_is_attention_under_the_mask_of_its_groups(spread: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 128, 4, generator=torch.Generator().manual_seed(0))
    windows, group = Windows(SIDE, SIZE, spread), groups(spread)
    masked = attention(q, k, v, group[:, None] == group)
    ours = windows.join(attention(windows.split(q), windows.split(k), windows.split(v), None))
    assert torch.allclose(ours, masked, atol=1e-5)
    assert torch.equal(windows.join(windows.split(q)), q)


def test_a_square_and_a_grid_connect_any_two_tokens() -> None:
    squares, grids = ((groups(spread)[:, None] == groups(spread)).double() for spread in (False, True))
    assert bool((squares @ grids > 0).all()) and bool((grids @ squares > 0).all())


def test_maps_up_to_the_window_keep_full_attention() -> None:
    """A 256x256 image has 16x16 tokens at most: a window of 16 must not change its model."""
    assert windows_of((16, 16), 16, 0) is None and windows_of((32, 32), 0, 0) is None
    assert windows_of((32, 32), 16, 2) == Windows((32, 32), 16, False)
    assert windows_of((16, 32), 16, 3) == Windows((16, 32), 16, True)
    plain, windowed = random_model(tiny_config()), random_model(tiny_config(head_window=12))
    stage, x, tokens = plain.plan[-1], torch.randn(1, 3, 8, 12), torch.randn(1, 96, 16)
    args = stage, x, torch.rand(1), plain.head.embed_tokens(stage, tokens), torch.tensor([0])
    assert torch.equal(plain.velocity(*args), windowed.velocity(*args))


def test_the_window_reaches_the_head_and_the_head_alone() -> None:
    windowed = random_model(windowed_config())
    full = random_model(windowed_config().replace(head_window=0))
    y, labels = [torch.randn(1, 3, 2, 4), torch.randn(1, 3, 4, 8)], torch.tensor([1])
    tokens = full.trunk(y, labels)
    assert all(torch.equal(a, b) for a, b in zip(tokens, windowed.trunk(y, labels), strict=True))
    for stage, same in zip(full.plan, (True, False, False), strict=True):
        x = torch.randn(1, 3, *stage.side)
        args = stage, x, torch.rand(1), full.head.embed_tokens(stage, tokens[stage.index]), labels
        assert torch.equal(full.velocity(*args), windowed.velocity(*args)) == same


@pytest.mark.parametrize("name", ["head_window", "trunk_window"])
@pytest.mark.parametrize("window", [3, -1, 2])
def test_a_window_that_does_not_divide_the_maps_or_leaves_tokens_unconnected_is_refused(name: str, window: int) -> None:
    with pytest.raises(ValueError, match=name):
        windowed_config().replace(**{name: window})


def test_the_number_of_a_token_s_group_is_that_of_its_square_or_grid() -> None:
    for spread in (False, True):
        ours = Windows(SIDE, SIZE, spread).groups()
        assert torch.equal(ours[:, None] == ours, groups(spread)[:, None] == groups(spread))


@pytest.mark.parametrize("window", [2, 4])
def test_a_windowed_trunk_step_by_step_is_the_masked_one_and_keeps_only_small_stages(window: int) -> None:
    sides = ((2, 2), (4, 4)) if window == 2 else ((2, 4), (4, 8), (8, 16))
    plan = StageConfig(sides=sides, ends=(*(0.7, 0.8)[: len(sides) - 1], 1.0), rho=0.7)
    stds = (1.0,) * len(sides)
    config = tiny_config(stages=plan, image_side=sides[-1], trunk_window=window, trunk_depth=3, velocity_std=stds)
    model = random_model(config)
    y, labels = [torch.randn(2, 3, *side) for side in sides[:-1]], torch.tensor([0, 2])
    with torch.no_grad():
        masked = model.trunk(y, labels)
        cache = model.trunk.new_cache(2, torch.device("cpu"), torch.float32)
        for stage, before, expected in zip(model.plan, [None, *y], masked, strict=True):
            assert torch.allclose(model.trunk.step(stage, before, labels, cache), expected, atol=1e-5)
        full = random_model(config.replace(trunk_window=0)).trunk(y, labels)
    assert cache.length == cache.memory(0, 0)[0].shape[2] == sum(h * w for h, w in sides if max(h, w) <= window)
    same = [torch.equal(a, b) for a, b in zip(masked, full, strict=True)]
    assert same == [max(side) <= window for side in sides]


def test_a_windowed_model_trains_and_a_run_from_it_keeps_the_window(digits_folder: Path, tmp_path: Path) -> None:
    common = ["--data", str(digits_folder), "--resolution", "8", "--device", "cpu", "--max-steps", "2"]
    common += ["--batch-size", "6", "--sample-every", "0", "--trackers"]
    sizes = ["--width", "16", "--heads", "2", "--trunk-depth", "1", "--head-depth", "2", "--tokenizer", "pixels:1"]
    assert main(["train", *common, "--out", str(tmp_path / "a"), *sizes, "--head-window", "4"]) == 0
    assert load_model(tmp_path / "a" / "final")[0].config.head_window == 4
    start = ["--init-from", str(tmp_path / "a" / "final")]
    assert main(["train", *common, "--out", str(tmp_path / "b"), *start]) == 0
    assert load_model(tmp_path / "b" / "final")[0].config.head_window == 4
    assert main(["train", *common, "--out", str(tmp_path / "c"), *start, "--head-window", "0"]) == 0
    assert load_model(tmp_path / "c" / "final")[0].config.head_window == 0
    assert main(["train", *common, "--out", str(tmp_path / "d"), *sizes, "--head-window", "3"]) == 2
    assert main(["train", *common, "--out", str(tmp_path / "e"), *start, "--trunk-window", "4"]) == 0
    assert load_model(tmp_path / "e" / "final")[0].config.trunk_window == 4


def test_a_windowed_block_compiles_to_the_same_function() -> None:
    block = random_model(windowed_config()).head.blocks[0]
    x, modulation, table = (
        torch.randn(2, 128, 16),
        torch.randn(2, 1, 96),
        rotary_table(SIDE, SIDE, 8, torch.device("cpu")),
    )
    windows = Windows(SIDE, SIZE, True)
    with torch.no_grad():
        eager = block(x, modulation, table, windows=windows)
        block.compile(dynamic=False)
        assert torch.allclose(block(x, modulation, table, windows=windows), eager, atol=1e-4)
