"""Trackers mirror the log, continue the same run, and never stop training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_training import lines, options

from ecar.training import loop
from ecar.training.engine import log as log_module
from ecar.training.engine.log import RunLog


class FakeRun:
    """What wandb.init gives, as far as it is used; every call is recorded."""

    def __init__(self, calls: list[tuple[str, Any]], fails_at: str) -> None:
        self.calls, self.fails_at, self.config = calls, fails_at, self

    def _call(self, name: str, value: Any) -> None:
        self.calls.append((name, value))
        if name == self.fails_at:
            raise ConnectionError("network\nis down")

    def update(self, record: dict[str, Any], **_: Any) -> None:
        self._call("config", record)

    def define_metric(self, name: str, **_: Any) -> None:
        self._call("metric", name)

    def log(self, values: dict[str, Any]) -> None:
        self._call("log", values)

    def finish(self) -> None:
        self._call("finish", None)


def fake_wandb(monkeypatch: pytest.MonkeyPatch, fails_at: str = "") -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []
    run, module = FakeRun(calls, fails_at), ModuleType("wandb")

    def init(**values: Any) -> FakeRun:
        run._call("init", values)
        return run

    module.init, module.Settings, module.Image = init, dict, str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_a_resumed_run_continues_the_same_tracker_run_and_a_new_one_does_not(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch)
    for steps in (3, 6):
        loop.train(options(digits_folder, tmp_path / "a", trackers=("wandb",), max_steps=steps))
    loop.train(options(digits_folder, tmp_path / "b", trackers=("wandb",), max_steps=1, sample_every=0))
    ids = [value["id"] for name, value in calls if name == "init"]
    assert ids[0] == ids[1] != ids[2]
    assert json.loads((tmp_path / "a" / "trackers.json").read_text()) == {"wandb": ids[0]}
    logged = [value for name, value in calls if name == "log"]
    losses = [(value["step"], value["loss"]) for value in logged if "loss" in value]
    assert losses[:6] == [(line["step"], line["loss"]) for line in lines(tmp_path / "a")]
    assert sum(name == "finish" for name, _ in calls) == 3
    assert any(str(value.get("samples", "")).endswith("step_00000006.png") for value in logged)


@pytest.mark.parametrize("fails_at", ["import", "init", "log", "finish"])
def test_a_tracker_that_fails_is_off_with_one_warning_and_training_ends(
    digits_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails_at: str,
) -> None:
    calls = fake_wandb(monkeypatch, fails_at)
    if fails_at == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    loop.train(options(digits_folder, tmp_path, trackers=("wandb",)))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert len(warnings) == 1 and "off from here on" in warnings[0]
    assert ("ecar[wandb]" if fails_at == "import" else "network is down") in warnings[0]
    assert len(lines(tmp_path)) == 6 and sum(name == "log" for name, _ in calls) <= 7
    if fails_at == "log":
        assert sum(name == "log" for name, _ in calls) == 1


def test_a_tracker_that_hangs_costs_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wandb(monkeypatch)
    hold = threading.Event()
    monkeypatch.setattr(FakeRun, "log", lambda *_: hold.wait(30))
    monkeypatch.setattr(log_module, "_CLOSE_SECONDS", 0.2)
    start = time.perf_counter()
    with RunLog(tmp_path, trackers=("wandb",)) as log:
        for step in range(2000):
            log.write(step=step, loss=1.0)
    assert time.perf_counter() - start < 10
    hold.set()
    assert "records behind" in capsys.readouterr().err
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2000


def test_the_first_record_says_what_the_run_is(digits_folder: Path, tmp_path: Path) -> None:
    loop.train(options(digits_folder, tmp_path, log_every=2))
    first, *rest = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    record = first["start"]
    assert first["step"] == 0 and record["effective_batch"] == 8 and record["rows_per_stage"] == [8, 8]
    assert record["options"]["stages"] == 2 and record["options"]["stage_weight"] == [1.0, 1.0]  # as resolved
    assert record["images_in_data"] == 120 and record["epochs"] == pytest.approx(6 * 8 / 120)
    assert record["parameters"] > 1000 and record["device"]["name"] == "cpu" and record["host"]
    assert set(record["versions"]) == {"ecar", "commit", "torch", "python"}
    assert len(rest) == 3 and all(line["images_per_second"] > 0 for line in rest)


def test_tensorboard_gets_the_numbers_and_the_picture(digits_folder: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loop.train(options(digits_folder, tmp_path, trackers=("tensorboard",)))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [s for s, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [v for _, v in found] == pytest.approx([line["loss"] for line in lines(tmp_path)])
    assert events.Images("samples")[0].step == 6


def _real(digits_folder: Path, out: Path, tracker: str, environment: dict[str, str]) -> None:
    """A real process, twice: start and resume."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]; from pathlib import Path; from test_training import options;"
        "from ecar.training import loop;"
        f"[loop.train(options(Path(sys.argv[2]), Path(sys.argv[3]), trackers=({tracker!r},), max_steps=n))"
        " for n in (3, 6)]"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(digits_folder), str(out)]
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])) if p)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0 and "is off" not in result.stderr, result.stderr


def test_a_real_offline_run_of_wandb(digits_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    _real(digits_folder, tmp_path / "run", "wandb", {"WANDB_MODE": "offline"})
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    stored = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
    assert stored and all(file.stat().st_size > 1000 for file in stored)
    assert b"loss_1" in b"".join(file.read_bytes() for file in stored)


def test_a_real_run_of_trackio(digits_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    _real(digits_folder, tmp_path / "run", "trackio", {"TRACKIO_DIR": str(tmp_path / "store")})
    stored = [file for file in (tmp_path / "store").rglob("*") if file.is_file()]
    assert any(b"loss_1" in file.read_bytes() for file in stored), stored
