"""The same step in less memory: micro-batches, shards over processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import killed_at_five, lines, options, weights

from ecar.cli.main import main
from ecar.processes.world import World
from ecar.training import loop


def same_run(a: Path, b: Path) -> None:
    """Equal up to rounding: losses and average."""
    for key in ("loss", "loss_1"):
        assert [x[key] for x in lines(a)] == pytest.approx([x[key] for x in lines(b)], abs=2e-5)
    first, second = weights(a), weights(b)
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)


@pytest.mark.parametrize("preset", ["16x2x1+1", "dit-16x2x1+1"])
@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4}])
def test_a_step_in_less_memory_is_the_same_step(
    digits_folder: Path, tmp_path: Path, changes: dict[str, Any], preset: str
) -> None:
    kind: dict[str, Any] = {"preset": preset}
    loop.train(options(digits_folder, tmp_path / "whole", **kind))
    loop.train(options(digits_folder, tmp_path / "parts", **kind, **changes))
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps_and_their_checkpoints_have_the_same_names(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled run that is killed goes on without the compiler."""
    loop.train(options(digits_folder, tmp_path / "whole"))
    with killed_at_five(monkeypatch):
        loop.train(options(digits_folder, tmp_path / "parts", compile=True))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    loop.train(options(digits_folder, tmp_path / "parts"))
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_goes_on_with_other_micro_batches(digits_folder: Path, tmp_path: Path) -> None:
    loop.train(options(digits_folder, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000006")
    loop.train(options(digits_folder, tmp_path / "parts", accumulate=2))
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_batch_that_cannot_be_cut_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows per stage \(8, 4\)\) must divide by .*--accumulate 8"):
        loop.train(options(digits_folder, tmp_path, accumulate=8, stage_share=(1.0, 0.5)))


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_in_any_world_the_parts_of_a_batch_are_the_batch(size: int, accumulate: int) -> None:
    """None lost, none repeated, and a stage that trains on a prefix trains on the same images."""
    batch = torch.arange(16)
    parts = [part for rank in range(size) for part in World(rank, size).parts(accumulate)]
    for prefix in (16, 8):
        seen = torch.cat([part.rows(batch)[: prefix // part.count] for part in parts])
        assert seen.sort().values.tolist() == list(range(prefix))


def test_out_of_memory_is_one_line_of_advice(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: loop.Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity")

    monkeypatch.setattr(loop.Trainer, "train_step", full)
    command = [
        "train",
        "--data",
        str(digits_folder),
        "--out",
        str(tmp_path),
        "--resolution",
        "8",
        "--preset",
        "16x2x1+1",
    ]
    command += ["--batch-size", "8", "--accumulate", "2", "--device", "cpu"]
    assert main(command) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("ecar: CUDA out of memory; ")
    assert all(word in message for word in ("--accumulate 4", "--parallel fsdp", "--batch-size"))
