"""Steps that become far slower are named once, with what helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecar.training.engine.log import RunLog, read_log
from ecar.training.engine.pace import Pace


class Clock:
    """Goes on only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(folder: Path, seconds: list[float], device: str = "cpu", threads: int = 4) -> list[dict[str, object]]:
    """Steps that take so long; the warnings in the log."""
    clock = Clock()
    with RunLog(folder) as log:
        pace = Pace(device, log, threads=threads, clock=clock)
        for number, length in enumerate(seconds, 1):
            with pace.step(number):
                clock.now += length
            clock.now += 1000  # a save, or a grid of samples
    return [record for record in read_log(folder) if "warning" in record]


def test_slow_steps_are_named_once_on_stderr_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same training ran 90 times slower beside other processes, and nothing said why."""
    warnings = run(tmp_path, [30.0, 2.0] + [1.0] * 20 + [90.0] * 40)
    said = capsys.readouterr().err
    assert len(warnings) == 1 and said.count("WARNING") == 1
    assert warnings[0]["step"] == 27 and "90 times" in said and "OMP_NUM_THREADS=1" in json.dumps(warnings)


@pytest.mark.parametrize(
    "seconds",
    [
        [1.0] * 60,
        [30.0, 10.0] + [1.0] * 60,  # compiling is no measure, and faster is no fault
        [1.0] * 30 + [4.0] * 30,  # a busy machine
        ([1.0] * 12 + [90.0] * 4) * 3,  # a pause, and then as before
    ],
)
def test_usual_unevenness_is_not_named(tmp_path: Path, seconds: list[float]) -> None:
    assert run(tmp_path, seconds) == []


@pytest.mark.parametrize(("device", "threads"), [("cuda", 4), ("cpu", 1)])
def test_nothing_is_said_where_no_threads_wait_for_each_other(tmp_path: Path, device: str, threads: int) -> None:
    assert run(tmp_path, [1.0] * 12 + [90.0] * 20, device, threads) == []
