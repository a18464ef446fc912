"""The engine with a task of three weights: it knows neither stages nor images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecar.processes.world import Part
from ecar.training.engine.log import read_log
from ecar.training.engine.options import RunOptions, ScaleOptions
from ecar.training.engine.task import Losses, Task
from ecar.training.engine.trainer import NonFiniteLossError, Trainer

TRUTH = torch.tensor([[1.0, -2.0, 0.5]])


class Line(Task):
    """Learns ``TRUTH`` by regression; the batches of some steps are not finite."""

    names, rows = ("error", "updates"), (4,)

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        torch.manual_seed(0)
        self.module, self.bad, self.saved, self.ready_after = nn.Linear(3, 1, bias=False), bad, list[int](), -1.0

    def optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
        return [torch.optim.AdamW(self.module.parameters(), lr=1.0)], []

    def rate(self, step: int) -> float:
        return 0.1 / step

    def check(self, record: dict[str, Any]) -> str:
        return "" if record["kind"] == "line" else "another kind"

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        assert tensors["more"].item() == updates

    def ready(self) -> None:
        self.ready_after = float(self.module.weight.detach().abs().sum())

    def begin(self, first: bool) -> dict[str, Any]:
        return {"kind": "line"} if first else {}

    def about(self) -> dict[str, Any]:
        return {"options": {}, "parameters": 3}

    def draw(self, step: int) -> Tensor:
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return batch * float("nan") if step in self.bad else batch

    def losses(self, module: nn.Module, batch: Tensor, part: Part) -> Losses:
        x = part.rows(batch)
        error = (module(x) - x @ TRUTH.T).square().mean()
        return Losses(error, error.detach().view(1), len(x))

    def updated(self, updates: int, rests: list[Any]) -> list[float]:
        assert sum(rests) == 4
        self.updates = updates
        return [float(updates)]

    def line(self, means: list[float]) -> dict[str, float]:
        return {"loss": means[0], **dict(zip(self.names, means, strict=True))}

    def rows_of(self, steps: range) -> dict[int, list[int]]:
        return {step: [step] for step in steps}

    def saving(self, step: int) -> None:
        self.saved.append(step)

    def tensors(self) -> dict[str, Tensor]:
        return {"more": torch.tensor(self.updates)}

    def record(self) -> dict[str, Any]:
        return {"kind": "line"}

    def picture(self, weights: dict[str, Tensor], step: int) -> Path:  # noqa: ARG002
        return Path("none")


def run(out: Path, steps: int, bad: tuple[int, ...] = (), accumulate: int = 1) -> Line:
    out.mkdir(exist_ok=True)
    options = RunOptions(
        out=str(out), max_steps=steps, batch_size=4, device="cpu", save_every=3,
    )  # fmt: skip
    task = Line(bad)
    Trainer(task, options, out, ema=(0.5,), scale=ScaleOptions(accumulate=accumulate), pictures=False).run()
    return task


def test_any_task_is_resumed_bit_for_bit_and_saves_what_is_its_own(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 9)
    first = run(tmp_path / "parts", 5)
    last = run(tmp_path / "parts", 9)
    assert torch.equal(whole.module.weight, last.module.weight) and (whole.updates, last.updates) == (9, 9)
    assert whole.saved == [3, 6, 9] and first.saved == [3, 5] and last.saved == [6, 9]
    assert last.ready_after == float(first.module.weight.detach().abs().sum())  # restored before it is compiled
    lines = [line for line in read_log(tmp_path / "parts") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert (whole.module.weight - TRUTH).norm() < (Line().module.weight - TRUTH).norm()
    assert [line["updates"] for line in lines] == list(range(1, 10)) and lines[3]["lr"] == 0.1 / 4


def test_any_task_skips_steps_that_are_not_finite_and_gives_up_after_five(tmp_path: Path) -> None:
    task = run(tmp_path / "some", 6, bad=(2, 3))
    assert task.updates == 4 and torch.isfinite(task.module.weight).all()
    with pytest.raises(NonFiniteLossError, match="5 steps in a row"):
        run(tmp_path / "all", 20, bad=tuple(range(4, 20)))
    assert list(json.loads((tmp_path / "all" / "non_finite.json").read_text())) == ["4", "5", "6", "7", "8"]


def test_micro_batches_of_any_task_take_the_same_steps(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", 4), run(tmp_path / "two", 4, accumulate=2)
    assert torch.allclose(one.module.weight, two.module.weight, atol=1e-6)
