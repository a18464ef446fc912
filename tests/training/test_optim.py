"""Muon in batches is torch's Muon; batches that are drawn ahead are those drawn on the spot."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import lines, options, weights

from conftest import random_model, tiny_config
from ecar.data.order import batch_indices, epoch_order
from ecar.training import build, draws, loop
from ecar.training.draws import BatchesAhead, draw_batch
from ecar.training.engine.optim import BatchedMuon

SHAPES = ((6, 4), (4, 6), (6, 4), (5, 5), (4, 6), (6, 4))


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def torchs(parameters: list[torch.nn.Parameter]) -> torch.optim.Muon:
    return torch.optim.Muon(parameters, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def ours(parameters: list[torch.nn.Parameter]) -> BatchedMuon:
    return BatchedMuon(parameters, lr=0.05, weight_decay=0.1)


def update(optimizers: Sequence[torch.optim.Optimizer], seed: int) -> None:
    """The same gradients for all; the last matrix gets none."""
    for optimizer in optimizers:
        generator = torch.Generator().manual_seed(seed)
        for parameter in optimizer.param_groups[0]["params"][:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_muon_in_batches_of_one_shape_takes_the_steps_of_torchs() -> None:
    batched, plain = matrices(), matrices()
    optimizers = [ours(batched), torchs(plain)]
    for seed in range(4):
        update(optimizers, seed)
    assert torch.equal(batched[-1], matrices()[-1])  # without a gradient
    for mine, theirs, start in zip(batched[:-1], plain[:-1], matrices(), strict=False):
        assert not torch.equal(mine, start)
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)  # bfloat16 inside


def test_muon_takes_the_kernel_of_a_convolution_as_a_matrix_of_its_outputs() -> None:
    generator = torch.Generator().manual_seed(1)
    start, gradient = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(6, 4, 3, 3, generator=generator)
    kernel = torch.nn.Parameter(start.clone().contiguous(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    kernel.grad, matrix.grad = gradient.contiguous(memory_format=torch.channels_last), gradient.flatten(1)
    ours([kernel]).step()
    torchs([matrix]).step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), atol=2e-3, rtol=0)


def test_batches_that_span_many_epochs_are_places_of_their_concatenation() -> None:
    wanted = torch.cat([epoch_order(3, 5, epoch) for epoch in range(9)])
    assert torch.equal(torch.cat([batch_indices(3, 8, 5, step) for step in range(3)]), wanted[:24])


def same(a: Any, b: Any) -> bool:
    (z, labels, one), (other, theirs, two) = a, b
    noise = all(torch.equal(x, y) for x, y in zip(one.noise + one.context, two.noise + two.context, strict=True))
    return torch.equal(z, other) and torch.equal(labels, theirs) and torch.equal(one.times, two.times) and noise


def test_batches_drawn_ahead_are_those_of_their_step(digits_folder: Path, tmp_path: Path) -> None:
    """Also where a step is not the next one (a run that resumes), and no thread is left behind."""
    config = options(digits_folder, tmp_path, device="cpu").resolve()
    table, _ = build.load_table(config)
    plan, before = random_model(tiny_config()).plan[:2], threading.active_count()
    with closing(BatchesAhead(config, table, plan, 3, ahead=True)) as batches:
        for step in (1, 2, 4, 4, 5, 6):
            assert same(batches(step), draw_batch(config, table, plan, 3, step))
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_thread_ends_the_step(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(digits_folder, tmp_path, device="cpu").resolve()
    table, _ = build.load_table(config)

    def fails(*_: object) -> None:
        raise OSError("a shard cannot be read")

    with closing(BatchesAhead(config, table, random_model(tiny_config()).plan[:2], 3, ahead=True)) as batches:
        batches(1)
        batches._next[1].result()  # type: ignore[index]
        monkeypatch.setattr(draws, "draw_batch", fails)
        batches(2)
        with pytest.raises(OSError, match="cannot be read"):
            batches(3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_run_trains_saves_its_curves_and_resumes(digits_folder: Path, tmp_path: Path) -> None:
    """Sums of losses that lay on the device could once not be drawn."""
    loop.train(options(digits_folder, tmp_path, device="cuda", max_steps=3, optimizer="muon"))
    loop.train(options(digits_folder, tmp_path, device="cuda", max_steps=6, optimizer="muon"))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6] and (tmp_path / "loss.png").exists()
    assert all(w.isfinite().all() for w in weights(tmp_path).values())
