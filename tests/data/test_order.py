"""The order of training is a pure function of seed and step."""

from __future__ import annotations

import torch

from ecar.data.order import batch_indices, derive_seed


def test_every_image_comes_once_an_epoch_though_batches_straddle_epochs() -> None:
    drawn = torch.cat([batch_indices(10, 4, 0, step) for step in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_other_batch_sizes_give_the_same_global_order() -> None:
    fours = torch.cat([batch_indices(10, 4, 7, step) for step in range(5)])
    twos = torch.cat([batch_indices(10, 2, 7, step) for step in range(10)])
    assert torch.equal(fours, twos)


def test_seeds_differ_for_other_parts_and_fit_a_generator() -> None:
    seeds = {derive_seed(s, k, n) for s in range(5) for k in range(3) for n in range(20)}
    assert len(seeds) == 300
    torch.Generator().manual_seed(max(seeds))
