"""The log of a run: what it says, and its copy for TensorBoard."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_training import lines, options

from ecar.training import loop
from ecar.training.engine.log import RunLog, read_log


def test_the_first_record_says_what_the_run_is(digits_folder: Path, tmp_path: Path) -> None:
    loop.train(options(digits_folder, tmp_path))
    first, *rest = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    record = first["start"]
    assert first["step"] == 0 and record["effective_batch"] == 8 and record["rows_per_stage"] == [8, 8]
    assert record["options"]["stages"] == [0.7, 1.0] and record["options"]["stage_share"] == [1.0, 1.0]  # as resolved
    assert record["images_in_data"] == 120 and record["epochs"] == pytest.approx(6 * 8 / 120)
    assert record["parameters"] > 1000 and record["device"]["name"] == "cpu" and record["host"]
    assert set(record["versions"]) == {"ecar", "commit", "torch", "python"}
    assert len(rest) == 6 and all(line["images_per_second"] > 0 for line in rest)


def test_tensorboard_gets_the_numbers_and_the_picture(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    loop.train(options(digits_folder, tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [s for s, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [v for _, v in found] == pytest.approx([line["loss"] for line in lines(tmp_path)])
    assert [image.step for image in events.Images("samples")] == [3, 6]


def test_tensorboard_that_fails_is_off_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError("no space left on device")

    with RunLog(tmp_path) as log:
        log._events = Full()
        for step in (1, 2):
            log.write(step=step, loss=1.0)
    assert capsys.readouterr().err.count("off from here on (no space left on device)") == 1
    assert len(read_log(tmp_path)) == 2


def test_a_run_without_room_for_the_event_file_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = full  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunLog(tmp_path) as log:
        log.write(step=1, loss=1.0)
    assert "TensorBoard is off (no space left on device)" in capsys.readouterr().err and len(read_log(tmp_path)) == 1
