"""Nothing is lost: crashes during a save, damaged files, full disks, signals, two runs in one folder, random kills."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import lines, options, weights

from conftest import load_checkpoint
from ecar.files.lock import run_lock
from ecar.processes.world import World
from ecar.training import loop
from ecar.training.engine import checkpoint, saving
from ecar.training.engine.checkpoint import save_checkpoint

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


class Crash(BaseException):
    """The process dies here."""


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 3), float(step)), "b": torch.arange(step + 1)}


def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the process die at the n-th operation on files of a save; returns the operations that were seen."""
    seen: list[str] = []

    def guarded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == call:
                raise Crash(name)
            return real(*args, **kwargs)

        return run

    monkeypatch.setattr(checkpoint, "write_tensors", guarded("write_tensors", checkpoint.write_tensors))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", guarded("rmtree", checkpoint.shutil.rmtree))
    monkeypatch.setattr(os, "fsync", guarded("fsync", os.fsync))
    for name in ("mkdir", "rename", "write_text"):
        monkeypatch.setattr(Path, name, guarded(name, getattr(Path, name)))
    return seen


def test_a_crash_at_any_operation_of_a_save_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations, call = [], 0
    while True:
        call += 1
        run = tmp_path / str(call)
        saver = saving.Saver(run, World(), None, saved=0)
        for step in (1, 2, 3):
            saver.save(step, tensors(step), {}, last=False)
        with monkeypatch.context() as patch:
            seen = crash_at(call, patch)
            try:
                saver.save(4, tensors(4), {}, last=True)
            except Crash:
                crashed = True
            else:
                crashed = False
        operations.append(seen[-1])
        found = load_checkpoint(run)
        assert found is not None
        step = int(found[1]["step"])
        assert step in (3, 4) and all(torch.equal(found[0][k], v) for k, v in tensors(step).items())
        assert not list((run / "checkpoints").glob("*.tmp"))
        if not crashed:
            break
    assert step == 4 and {"write_tensors", "write_text", "fsync", "rename", "rmtree", "mkdir"} <= set(operations)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "json", "record", "manifest", "unlisted"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), {})
    names = {"json": "state.json", "record": "state.json", "manifest": "manifest.json", "unlisted": "manifest.json"}
    file = tmp_path / "checkpoints" / "step_00000002" / names.get(damage, "state.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit: safetensors loads it without a word
    file.write_bytes(data[:50] if damage in ("truncate", "manifest") else data)
    if damage in ("remove", "record", "unlisted"):
        file.unlink()
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1
    message = capsys.readouterr().err
    words = dict.fromkeys(("flip", "truncate", "json"), "hash mismatch") | {"manifest": "not readable"}
    word = words.get(damage, "missing")
    assert f"{file.name}: {word}" in message or f"{file.name} is {word}" in message


@pytest.mark.parametrize("lost", ["state.safetensors", "state.json"])
def test_only_damaged_checkpoints_are_an_error_not_a_new_start(tmp_path: Path, lost: str) -> None:
    """A folder without its record did not count as a checkpoint, and the run began again at step 0."""
    save_checkpoint(tmp_path, 1, tensors(1), {})
    (tmp_path / "checkpoints" / "step_00000001" / lost).unlink()
    with pytest.raises(ValueError, match=f"{lost} is missing.*no other is left"):
        load_checkpoint(tmp_path)


def test_a_copy_of_a_checkpoint_under_another_name_is_neither_resumed_nor_deleted(tmp_path: Path) -> None:
    """ "step_best" sorted behind all numbers, and "step_00000001_keep" was rotated away."""
    save_checkpoint(tmp_path, 1, tensors(1), {})
    copies = [tmp_path / "checkpoints" / name for name in ("step_best", "step_00000001_keep")]
    for copy in copies:
        shutil.copytree(tmp_path / "checkpoints" / "step_00000001", copy)
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, tensors(step), {})
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 4 and all(copy.exists() for copy in copies)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was "a run is active there ()"."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with run_lock(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_what_a_killed_save_left_is_named_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {})
    left = tmp_path / "checkpoints" / "step_00000002.tmp"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1 and not left.exists()
    assert capsys.readouterr().err == f"{left}: left by a save that was killed; removed\n"


@pytest.mark.parametrize(("failures", "ends"), [(2, False), (3, True)])
def test_a_full_disk_stops_training_only_after_three_saves_in_a_row(
    digits_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failures: int,
    ends: bool,
) -> None:
    real, calls = saving.save_checkpoint, []

    def full(*args: Any, **kwargs: Any) -> Path:
        calls.append(1)
        if 1 < len(calls) <= 1 + failures:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(saving, "save_checkpoint", full)
    config = options(digits_folder, tmp_path, save_every=1, max_steps=6)
    if ends:
        with pytest.raises(OSError, match="No space left"):
            loop.train(config)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]  # what was there is there
    else:
        loop.train(config)
    assert capsys.readouterr().err.count("WARNING: step") == 2
    assert sum("failed_save" in line for line in lines(tmp_path)) == 2


def test_a_full_disk_at_the_last_save_is_an_error(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(options(digits_folder, tmp_path, save_every=6))


def arguments(data: Path, out: Path, steps: int) -> list[str]:
    flags = {
        "data": data, "out": out, "tokenizer": "pixels:2", "resolution": 8, "preset": "16x2x1+1",
        "max-steps": steps, "batch-size": 8, "save-every": 1000,
        "decay": 0.0, "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    pairs = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
    return [sys.executable, "-m", "ecar", "train", *pairs]


def started(command: list[str], out: Path) -> subprocess.Popen[str]:
    """A run that has taken some steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_saves_exits_with_its_code_and_is_where_an_undisturbed_run_is(
    digits_folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = started(arguments(digits_folder, tmp_path / "parts", 1_000_000), tmp_path / "parts")
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code and "the same command resumes" in error
    stopped = load_checkpoint(tmp_path / "parts")
    assert stopped is not None
    step = int(stopped[1]["step"])
    # The run left alone has the same number of steps, on which warm-up depends; it is killed after this save.
    whole = [*arguments(digits_folder, tmp_path / "whole", 1_000_000), "--save-every", str(step)]
    saved = tmp_path / "whole" / "checkpoints" / f"step_{step:08d}"
    other = started(whole, tmp_path / "whole")
    while not saved.exists():
        assert other.poll() is None
        time.sleep(0.01)
    other.kill()
    other.communicate()
    alone = load_file(saved / "state.safetensors")
    assert all(torch.equal(tensor, stopped[0][name]) for name, tensor in alone.items())


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_one_is_taken_over(
    digits_folder: Path, tmp_path: Path
) -> None:
    command = arguments(digits_folder, tmp_path, 1_000_000)
    first = started(command, tmp_path)
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2 and f"pid {first.pid}" in second.stderr
    first.kill()
    first.communicate()
    (tmp_path / "log.jsonl").unlink()  # what `started` waits for
    third = started(command, tmp_path)
    third.terminate()
    assert f"taking over from a run that died (pid {first.pid}" in third.communicate(timeout=60)[1]


def test_the_lock_goes_when_the_block_ends(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path), pytest.raises(ValueError, match="a run is active"), run_lock(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_is_refused_before_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write there"):
        loop.train(options(tmp_path / "no data here", tmp_path / "file" / "run"))


@pytest.mark.slow
def test_random_kills_of_two_processes_change_nothing(digits_folder: Path) -> None:
    """The first kill takes all processes while they start, the second a single worker between two steps."""
    command = [sys.executable, str(SCRIPTS / "training_kills.py"), "--data", str(digits_folder), "--kills", "2"]
    result = subprocess.run([*command, "--seed", "215", "--steps", "30"], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0 and '"same": true' in result.stdout, result.stdout + result.stderr


def test_resumed_after_a_fall_back_is_bit_for_bit_the_undisturbed_run(digits_folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(options(digits_folder, whole))
    loop.train(options(digits_folder, parts))
    newest = parts / "checkpoints" / "step_00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    loop.train(options(digits_folder, parts))  # from step 3 again
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
