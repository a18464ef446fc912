"""Averages of the weights at several horizons: formula, resume, old checkpoints, and steps that are not finite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import killed_at_five, options, weights

from ecar.training import loop, loss
from ecar.training.config import TrainConfig


def test_each_horizon_is_what_a_run_of_that_one_alone_gives(digits_folder: Path, tmp_path: Path) -> None:
    """Training does not depend on the averages; the first is final/, the others lie beside it."""
    loop.train(options(digits_folder, tmp_path / "both", ema=(0.3, 0.05)))
    for decay, name in ((0.3, "final"), (0.05, "final_ema_0.05")):
        alone = loop.train(options(digits_folder, tmp_path / str(decay), ema=(decay,)))
        a, b = load_file(alone / "model.safetensors"), load_file(tmp_path / "both" / name / "model.safetensors")
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert json.loads((tmp_path / "both" / name / "training.json").read_text())["ema"] == decay
    assert any(not torch.equal(a[k], weights(tmp_path / "both")[k]) for k in a)


def test_a_resumed_run_has_every_horizon_bit_for_bit(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(options(digits_folder, tmp_path / "whole", ema=(0.3, 0.05)))
    with killed_at_five(monkeypatch):
        loop.train(options(digits_folder, tmp_path / "parts", ema=(0.3, 0.05)))
    loop.train(options(digits_folder, tmp_path / "parts", ema=(0.3, 0.05)))
    for name in ("final", "final_ema_0.05"):
        a, b = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_from_when_there_were_fewer_options_still_resumes(digits_folder: Path, tmp_path: Path) -> None:
    loop.train(options(digits_folder, tmp_path / "new"))
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    path = tmp_path / "old" / "recipe.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("flip")]
    path.write_text("\n".join(lines))
    for run in ("new", "old"):
        loop.train(options(digits_folder, tmp_path / run, max_steps=8))
    a, b = weights(tmp_path / "new"), weights(tmp_path / "old")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_steps_without_a_finite_loss_or_gradient_leave_every_average_as_it_was(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault of other trainers: the weights are spared, and the average takes in NaN."""
    real, calls = loss.stage_losses, []

    def broken(*args: Any) -> list[torch.Tensor]:
        calls.append(1)
        bad = {2: float("nan"), 3: float("inf")}.get(len(calls))
        if len(calls) == 4:  # a finite loss whose gradient is not
            return [x + (x - x.detach()).abs().sqrt() for x in real(*args)]
        return [x * bad for x in real(*args)] if bad else real(*args)

    monkeypatch.setattr(loss, "stage_losses", broken)
    seen: list[tuple[bool, bool]] = []
    step = loop.Trainer.train_step

    def watched(self: loop.Trainer) -> torch.Tensor | None:
        before = {k: v.clone() for k, v in (self.ema.tensors() | self.task.module.state_dict()).items()}
        updates, means = self.ema.updates, step(self)
        after = self.ema.tensors() | self.task.module.state_dict()
        assert all(torch.isfinite(v).all() for v in after.values())
        same = all(torch.equal(before[k], v) for k, v in after.items()) and updates == self.ema.updates
        seen.append((means is None, same))
        return means

    monkeypatch.setattr(loop.Trainer, "train_step", watched)
    loop.train(options(digits_folder, tmp_path, ema=(0.3, 0.05)))
    skipped = (True, True)
    assert seen == [(False, False), skipped, skipped, skipped, (False, False), (False, False)]


@pytest.mark.parametrize("ema", [(), (0.9, 0.9), (0.9, 1.0), (-0.1,)])
def test_wrong_decays_are_refused(ema: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="--ema takes different decays"):
        TrainConfig.of(data="d", out="o", ema=ema)
