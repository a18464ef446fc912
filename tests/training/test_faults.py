"""Signals in the middle of other work, disks that are full for everything, data that change behind a run's back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_recovery import arguments
from test_training import lines, options, weights
from test_watchdog import alive, command, processes
from worker import TORCHRUN

from conftest import load_checkpoint, tiny_config
from ecar.cli.main import main
from ecar.data.shards import load_latents
from ecar.files import tensors
from ecar.pretrained.build import build_model
from ecar.pretrained.folders import save_model
from ecar.processes.signals import Stopped
from ecar.tokenizers import PixelTokenizer
from ecar.training import build, generator, loop
from ecar.training import tokenizer as tokenizer_module
from ecar.training.config import TokenizerConfig
from ecar.training.engine import checkpoint
from ecar.training.engine import log as log_module

SECOND = """
import os, signal, sys
from ecar.cli.main import main
from ecar.training.engine import checkpoint
write = checkpoint.write_tensors
def killed_twice(path, tensors):
    if path.parent.name == "step_00000006.tmp":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return write(path, tensors)
checkpoint.write_tensors = killed_twice
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["save", "grid"])
def test_a_signal_in_a_save_or_a_grid_of_samples_lets_it_end_and_stops_then(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: signal.Signals
) -> None:
    module, name = (checkpoint, "write_tensors") if place == "save" else (generator, "save_samples")
    real, seen = getattr(module, name), []

    def signalled(*args: Any) -> Any:
        if not seen:
            seen.append(1)
            os.kill(os.getpid(), number)
        return real(*args)

    config = options(digits_folder, tmp_path / "run", save_every=3)
    monkeypatch.setattr(module, name, signalled)
    with pytest.raises(Stopped, match="after step 3, checkpoint written") as stopped:
        loop.train(config)
    assert stopped.value.code == (75 if number == signal.SIGTERM else 130)
    assert (tmp_path / "run" / "samples" / "step_00000003.png").exists()
    found = load_checkpoint(tmp_path / "run")
    assert found is not None and found[1]["step"] == 3
    loop.train(config)
    loop.train(options(digits_folder, tmp_path / "whole", save_every=3))
    a, b = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_signal_while_images_are_read_does_not_wait_for_the_first_step(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of encoding looked as if Ctrl-C did nothing."""

    def reads(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("went on")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(build, "encode_source", reads)
    with pytest.raises(Stopped, match="before a step; the same command goes on") as stopped:
        loop.train(options(digits_folder, tmp_path))
    assert stopped.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert loop.train(options(digits_folder, tmp_path, max_steps=1)).exists()  # the lock is free


@pytest.mark.parametrize("adversarial", ["0", "0.5"])
def test_a_stopped_tokenizer_resumes_where_it_was_and_two_do_not_share_a_folder(
    adversarial: str, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A signal cost all steps since the last checkpoint, and a second run wrote into the folder of the first."""
    command = ["tokenizer", "--data", str(digits_folder), "--resolution", "8", "--factor", "2", "--widths", "8", "8"]
    command += ["--depth", "1", "--batch-size", "8", "--perceptual", "0", "--max-steps", "6", "--device", "cpu"]
    command += ["--adversarial", adversarial]
    monkeypatch.setattr("ecar.training.adversary._WARM_UP", 2)
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    draw, part, codes = tokenizer_module._draw, str(tmp_path / "part"), []

    def signalled(config: TokenizerConfig, images: Any, step: int) -> Any:
        if step == 4 and not codes:
            codes.append(main([*command, "--out", part]))
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(config, images, step)

    monkeypatch.setattr(tokenizer_module, "_draw", signalled)
    with pytest.raises(SystemExit, match="75"):
        main([*command, "--out", part])
    said = capsys.readouterr().err
    assert codes == [2] and "a run is active there" in said and "stopped after step 4, checkpoint written" in said
    assert main([*command, "--out", part]) == 0
    a, b = (load_file(tmp_path / run / "tokenizer.safetensors") for run in ("part", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [line["step"] for line in lines(tmp_path / "part")] == [1, 2, 3, 4, 5, 6]


def test_a_tokenizer_is_not_trained_further_on_other_images(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command made another tokenizer under the same name: models and latents of the first no longer fitted."""
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    command = ["tokenizer", "--data", str(data), "--resolution", "8", "--factor", "2", "--widths", "8", "8"]
    command += ["--depth", "1", "--batch-size", "8", "--perceptual", "0", "--max-steps", "1", "--device", "cpu"]
    command += ["--out", str(tmp_path / "run")]
    assert main(command) == 0 == main(command)
    shutil.copy(data / "one" / "0.png", data / "one" / "1.png")
    before = (tmp_path / "run" / "tokenizer.safetensors").read_bytes()
    assert main(command) == 2 and "the data changed since the checkpoint" in capsys.readouterr().err
    assert (tmp_path / "run" / "tokenizer.safetensors").read_bytes() == before


def test_a_full_disk_under_the_final_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an error of its own for it, that nobody caught."""

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match=r"tokenizer\.safetensors: No space left"):
        save_model(tmp_path / "model", build_model(tiny_config()), PixelTokenizer(factor=1))


@pytest.mark.slow
def test_a_second_signal_in_a_save_ends_at_once_and_damages_nothing(digits_folder: Path, tmp_path: Path) -> None:
    flags = arguments(digits_folder, tmp_path, 9)[3:]
    run = [sys.executable, "-c", SECOND, *flags, "--save-every", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert (tmp_path / "checkpoints" / "step_00000006.tmp").exists()
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_that_is_asked_to_stop_leaves_a_checkpoint_of_all_ranks(
    digits_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """What a scheduler does: the signal goes to torchrun alone, which passes it on to its processes. SIGUSR1 it has to
    be told of: it would die of it, and leave them behind."""
    out = tmp_path / "run"
    flags = command(digits_folder, out, max_steps=100_000, save_every=100_000)
    told = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    launcher = [sys.executable, *TORCHRUN, *told, "--nproc-per-node", "2", "-m", "ecar", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(launcher, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    workers = processes(out, process.pid)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "checkpoint written; the same command resumes" in output, output
    assert len(workers) == 2 and not any(map(alive, workers))
    found = load_checkpoint(out)
    assert found is not None and found[1]["step"] >= 3


def test_a_disk_that_is_full_for_everything_ends_a_run_only_with_the_third_failed_save(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saves were allowed to fail, but the note of it in the log, the loss curves or a grid then ended the run."""
    full: list[bool] = []

    def no_room(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def guarded(real: Any) -> Any:
        return lambda *args, **kwargs: (no_room if full else real)(*args, **kwargs)

    step = loop.Trainer.train_step

    def fills(self: loop.Trainer) -> torch.Tensor | None:
        full[:] = [True] if self.step in (2, 3) else []
        return step(self)

    monkeypatch.setattr(loop.Trainer, "train_step", fills)
    monkeypatch.setattr(log_module, "open", guarded(open), raising=False)
    monkeypatch.setattr(generator, "plot_losses", guarded(generator.plot_losses))
    monkeypatch.setattr(generator, "save_samples", guarded(generator.save_samples))
    monkeypatch.setattr(checkpoint, "write_tensors", guarded(checkpoint.write_tensors))
    loop.train(options(digits_folder, tmp_path, save_every=1))
    found = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert found == [1, 2, 3, 4, 5, 6]  # the lines of the time without room came later
    assert sum("failed_save" in line for line in lines(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.count("no checkpoint") == said.count("a grid of samples is not written") == 2
    assert said.count("log.jsonl") == 1


def test_what_a_failed_save_left_does_not_keep_the_disk_full(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000001.tmp" / "state.safetensors").write_bytes(bytes(1000))
    checkpoint.save_checkpoint(tmp_path, 2, {"a": torch.ones(3)}, {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_half_a_line_that_a_full_disk_took_is_not_left_in_the_log(tmp_path: Path) -> None:
    log = log_module.RunLog(tmp_path)
    log.write(step=1, loss=1.0)

    class Torn:
        def __init__(self, *args: Any) -> None:
            self.file = open(*args)  # noqa: SIM115

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def tell(self) -> int:
            return self.file.tell()

        def write(self, data: bytes) -> None:
            self.file.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "open", Torn, raising=False)
        log.write(step=2, loss=2.0)
    log.write(step=3, loss=3.0)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_images_that_changed_places_since_the_checkpoint_are_refused(digits_folder: Path, tmp_path: Path) -> None:
    """As many images and the same classes, but another order: the resumed run was another run, and did not say so."""
    data = copied(digits_folder, tmp_path)
    tokenizer = PixelTokenizer(factor=2)
    tokenizer.measure([torch.rand(8, 12, 4, 4)])  # else its statistics of the data would tell
    tokenizer.save(tmp_path / "tokenizer")
    common: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer")}
    loop.train(options(data, tmp_path / "run", **common))
    for file in data.rglob("*.png"):
        os.utime(file)  # a copy of the data is the same data
    loop.train(options(data, tmp_path / "run", max_steps=7, **common))
    a, b = data / "one" / "0.png", data / "one" / "1.png"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(ValueError, match=r"the data changed since the checkpoint \(content \w+ -> \w+\)"):
        loop.train(options(data, tmp_path / "run", max_steps=8, **common))


def test_a_cache_that_was_encoded_again_from_other_images_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    from ecar.cli import encode

    data, cache = copied(digits_folder, tmp_path), tmp_path / "cache"
    words = ["--data", str(data), "--out", str(cache), "--tokenizer", "pixels:2", "--resolution", "8"]
    encode.run(words)
    before, _ = load_latents(str(cache))
    loop.train(options(cache, tmp_path / "run", tokenizer=None))
    for file in cache.glob("*.*"):
        file.unlink()
    (data / "one" / "0.png").write_bytes((data / "one" / "1.png").read_bytes())
    encode.run(words)
    after, _ = load_latents(str(cache))
    assert len(before) == len(after) and before.content != after.content
    with pytest.raises(ValueError, match=r"the data changed since the checkpoint .*content"):
        loop.train(options(cache, tmp_path / "run", tokenizer=None, max_steps=8))


def copied(digits_folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(digits_folder, tmp_path / "data"))
