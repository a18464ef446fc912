"""Trainings over several processes: sharded or not, resumed in another number of them, bit for bit in the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from test_training import lines, options, weights

from conftest import load_checkpoint
from ecar.files.options import flat
from ecar.training import loop
from ecar.training.config import TrainConfig

pytestmark = pytest.mark.slow


def job(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Of ``worker.py``."""
    own = {k: changes.pop(k) for k in ("world", "stop_at", "stop_rank", "nan_at", "nan_rank", "copy") if k in changes}
    return {**flat(options(data, out, **{"device": "cpu", **changes})), **own}


def same_run(a: Path, b: Path) -> None:
    """Equal up to rounding: losses and average."""
    assert [x["loss"] for x in lines(a)] == pytest.approx([x["loss"] for x in lines(b)], abs=5e-5)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.allclose(first[k], second[k], atol=2e-5) for k in first)


def identical(a: Path, b: Path) -> None:
    """Bit for bit: final weights, logs, and everything in the newest checkpoint."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert [x["loss"] for x in lines(a)] == [x["loss"] for x in lines(b)]
    one, two = load_checkpoint(a), load_checkpoint(b)
    assert one and two and one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][k], two[0][k]) for k in one[0])


@pytest.mark.parametrize("model", ["ecar", "dit"])
def test_shards_over_two_and_four_processes_take_the_steps_of_one(
    digits_folder: Path, tmp_path: Path, model: str
) -> None:
    """With micro-batches on top."""
    preset = "16x2x1+1" if model == "ecar" else "dit-16x2x1+1"
    kind: dict[str, Any] = {"preset": preset, "max_steps": 4, "save_every": 4}
    sharded = {**kind, "parallel": "fsdp"}
    two = {"world": 2, "accumulate": 2, **sharded}
    jobs = [job(digits_folder, tmp_path / "2", **two)]
    if model == "ecar":
        jobs.append(job(digits_folder, tmp_path / "4", world=4, **sharded))
    worker.start(jobs, tmp_path)
    loop.train(options(digits_folder, tmp_path / "one", **kind))
    for size in (2, 4)[: len(jobs)]:
        out = tmp_path / str(size)
        same_run(tmp_path / "one", out)
        assert (out / "samples" / "step_00000004.png").exists()
        one, more = load_checkpoint(tmp_path / "one"), load_checkpoint(out)
        assert one and more and {n: t.shape for n, t in one[0].items()} == {n: t.shape for n, t in more[0].items()}


def test_a_checkpoint_goes_on_in_any_number_of_processes(digits_folder: Path, tmp_path: Path) -> None:
    """Four processes stop after step 2; two, one, and two that are not sharded go on from there, and shards
    from a checkpoint without: order, noise and times of the data are those of the run that one process made."""
    stopped, plain, common = tmp_path / "stopped", tmp_path / "plain", {"max_steps": 4, "save_every": 4}
    worker.start(
        [
            job(digits_folder, stopped, world=4, stop_at=2, stop_rank=2, parallel="fsdp", **common),
            job(digits_folder, tmp_path / "two", world=2, copy=str(stopped), parallel="fsdp", **common),
            job(digits_folder, tmp_path / "ddp", world=2, copy=str(stopped), **common),
            job(digits_folder, tmp_path / "one", world=1, copy=str(stopped), parallel="fsdp", **common),
            job(digits_folder, plain, world=1, stop_at=2, **common),
            job(digits_folder, tmp_path / "shards", world=2, copy=str(plain), parallel="fsdp", **common),
        ],
        tmp_path,
    )
    loop.train(options(digits_folder, tmp_path / "whole", **common))
    for out in ("two", "ddp", "one", "shards"):
        same_run(tmp_path / "whole", tmp_path / out)
        assert [x["step"] for x in lines(tmp_path / out)] == [1, 2, 3, 4]


def test_ten_steps_are_five_and_five_under_torchrun_bit_for_bit(digits_folder: Path, tmp_path: Path) -> None:
    """Real launches of two processes: stopped by SIGTERM in step 5, then started again."""
    kinds = ("ddp", "fsdp")
    wholes, parts, rest = [], [], []
    for kind in kinds:
        common = {"max_steps": 10, "parallel": kind}
        wholes.append(job(digits_folder, tmp_path / f"whole_{kind}", **common))
        parts.append(job(digits_folder, tmp_path / f"parts_{kind}", stop_at=5, stop_rank=1, **common))
        rest.append(job(digits_folder, tmp_path / f"parts_{kind}", **common))
    worker.start(wholes + parts, tmp_path, torchrun=2)
    for kind in kinds:
        assert [x["step"] for x in lines(tmp_path / f"parts_{kind}")] == [1, 2, 3, 4, 5]
    worker.start(rest, tmp_path, torchrun=2)
    for kind in kinds:
        identical(tmp_path / f"whole_{kind}", tmp_path / f"parts_{kind}")


def test_muon_needs_whole_matrices() -> None:
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        TrainConfig.of(data="d", out="o", parallel="fsdp", optimizer="muon")
    with pytest.raises(ValueError, match="ddp or fsdp"):
        TrainConfig.of(data="d", out="o", parallel="zero")
