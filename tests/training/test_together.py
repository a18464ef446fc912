"""Options that meet: fine-tuning, LoRA and distillation over several processes take the steps of one process, and what
does not go together is one line and exit code 2 before data are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from safetensors.torch import load_file
from test_finetune import saved, tuned
from test_processes import job, same_run
from test_training import lines, options, weights

from conftest import load_checkpoint
from ecar.cli.main import main
from ecar.config import SamplingConfig
from ecar.files.options import flat
from ecar.pretrained.folders import load_model
from ecar.sampling.pipeline import Pipeline
from ecar.training import loop


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of other classes than the digits, guided."""
    sampling = SamplingConfig(steps=(3, 2), guidance=(3.0, 1.0), solver="ab2")
    return saved(tmp_path / "source", class_names=("cat", "one", "ZERO"), sampling=sampling)


@pytest.fixture
def known(digits_folder: Path, tmp_path: Path) -> Path:
    """Digits under the source's class names: a student may have no others."""
    for old, new in (("zero", "ZERO"), ("one", "one"), ("seven", "cat")):
        shutil.copytree(digits_folder / old, tmp_path / "known" / new)
    return tmp_path / "known"


def several(data: Path, out: Path, source: Path, **changes: Any) -> dict[str, Any]:
    """A job of ``worker.py`` that leaves to the source what ``tuned`` does."""
    own = {k: changes.pop(k) for k in ("world", "stop_at", "stop_rank", "copy") if k in changes}
    config = tuned(data, out, source, **{"device": "cpu", **changes})
    return {**flat(config), **own}


STEPS: dict[str, Any] = {"max_steps": 4, "save_every": 4}
KINDS: dict[str, dict[str, Any]] = {
    "init_from": {},
    "lora": {"lora_rank": 2, "lr": 1e-2},
}


@pytest.mark.slow
def test_two_processes_of_torchrun_fine_tune_as_one_and_resume_bit_for_bit(
    digits_folder: Path, tmp_path: Path, source: Path
) -> None:
    """The weights of a new class are drawn at random: every process once had to draw the same by itself. All
    kinds in two launches, since starting processes is most of the time."""
    pytest.importorskip("peft")
    first, again = [], []
    for kind, changes in KINDS.items():
        whole, parts, common = tmp_path / kind / "two", tmp_path / kind / "parts", {**changes, **STEPS}
        first.append(several(digits_folder, whole, source, **common))
        first.append(several(digits_folder, parts, source, stop_at=2, stop_rank=1, **common))
        again.append(several(digits_folder, parts, source, **common))
    worker.start(first, tmp_path, torchrun=2)
    for kind, changes in KINDS.items():
        one = tuned(digits_folder, tmp_path / kind / "one", source, device="cpu", **changes, **STEPS)
        loop.train(one)
        assert [x["step"] for x in step_lines(tmp_path / kind / "two")] == [1, 2, 3, 4]
        same_steps(tmp_path / kind / "one", tmp_path / kind / "two")
    shutil.move(source, tmp_path / "gone")  # a resumed run does not read it
    worker.start(again, tmp_path, torchrun=2)
    for kind in KINDS:
        a, b = weights(tmp_path / kind / "two"), weights(tmp_path / kind / "parts")
        assert all(torch.equal(a[k], b[k]) for k in a), kind
    lora, saved_as = tmp_path / "lora", Path("adapter") / "adapter_model.safetensors"
    alone, both = load_file(lora / "one" / saved_as), load_file(lora / "two" / saved_as)
    assert alone.keys() == both.keys() and all(torch.allclose(alone[k], both[k], atol=2e-5) for k in alone)
    pipe, a = (
        Pipeline.from_pretrained(tmp_path / "gone", device="cpu", adapter=lora / "two" / "adapter"),
        weights(lora / "two"),
    )
    assert all(torch.allclose(v, a[k], atol=1e-6) for k, v in pipe.model.state_dict().items())


def step_lines(out: Path) -> list[dict[str, float]]:
    return [line for line in lines(out) if "loss" in line]


def same_steps(a: Path, b: Path) -> None:
    """Equal up to rounding: losses and average. The first line of the log says what was loaded."""
    assert lines(a)[0] == lines(b)[0]
    assert [x["loss"] for x in step_lines(a)] == pytest.approx([x["loss"] for x in step_lines(b)], abs=5e-5)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.allclose(first[k], second[k], atol=5e-5) for k in first)


@pytest.mark.slow
def test_shards_fine_tune_and_distil_as_one_process_does(
    digits_folder: Path, known: Path, tmp_path: Path, source: Path
) -> None:
    """FSDP cuts the model that is trained; the teacher stays whole."""
    runs: dict[str, tuple[Path, dict[str, Any]]] = {
        "tuned": (digits_folder, {}),
        "guidance": (known, {"distill": ()}),
        "steps": (known, {"distill": (), "distill_steps": (2, 1), "accumulate": 2}),
    }
    jobs = []
    for name, (data, changes) in runs.items():
        common = {**STEPS, **changes, "parallel": "fsdp", "world": 2}
        jobs.append(several(data, tmp_path / f"{name}_2", source, **common))
        if name == "guidance":
            jobs.append(several(data, tmp_path / "parts", source, **common, stop_at=2))
            jobs.append(several(data, tmp_path / "parts", source, **common))
    worker.start(jobs, tmp_path)
    for name, (data, changes) in runs.items():
        loop.train(tuned(data, tmp_path / name, source, device="cpu", **STEPS, **changes))
        same_steps(tmp_path / name, tmp_path / f"{name}_2")
    a, b = weights(tmp_path / "guidance_2"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)
    sampling = load_model(tmp_path / "guidance_2" / "final")[0].config.sampling
    assert sampling is not None and sampling.guidance == (1.0, 1.0)


@pytest.mark.slow
def test_an_adapter_learns_the_teachers_guidance_in_one_process_and_in_two(
    known: Path, tmp_path: Path, source: Path
) -> None:
    """LoRA changes the student in place; the teacher is the source as it is on disk."""
    pytest.importorskip("peft")
    common = {**STEPS, "distill": (), "lora_rank": 2, "lr": 1e-2}
    worker.start([several(known, tmp_path / "two", source, world=2, **common)], tmp_path)
    final = loop.train(tuned(known, tmp_path / "one", source, device="cpu", **common))
    same_steps(tmp_path / "one", tmp_path / "two")
    before, after = load_file(source / "model.safetensors"), load_file(final / "model.safetensors")
    changed = {k.split(".")[-2] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"to_qkv", "to_out"}
    pipe = Pipeline.from_pretrained(source, device="cpu", adapter=tmp_path / "one" / "adapter")
    assert pipe.model.config.sampling == SamplingConfig(steps=(3, 2), guidance=(1.0, 1.0), solver="ab2")
    longer = {**common, "max_steps": 80, "save_every": 80, "batch_size": 32}
    loop.train(tuned(known, tmp_path / "long", source, device="cpu", **longer))
    losses = [line["loss"] for line in step_lines(tmp_path / "long")]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_four_processes_that_hold_the_whole_model_take_the_steps_of_one(digits_folder: Path, tmp_path: Path) -> None:
    worker.start([job(digits_folder, tmp_path / "four", world=4, **STEPS)], tmp_path)
    loop.train(options(digits_folder, tmp_path / "one", **STEPS))
    same_run(tmp_path / "one", tmp_path / "four")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_ends_all(
    digits_folder: Path, tmp_path: Path, parallel: str
) -> None:
    """A rank that skips alone, or leaves alone, keeps the others waiting for ever."""
    common = {"parallel": parallel, "max_steps": 6, "save_every": 3}
    once = job(digits_folder, tmp_path / "once", world=2, nan_at=(2,), nan_rank=1, **common)
    always = job(digits_folder, tmp_path / "always", world=2, nan_at=(4, 5, 6, 7, 8), nan_rank=1,
                 **{**common, "max_steps": 20})  # fmt: skip
    said = worker.start([once, always], tmp_path, check=False)
    assert [(x["step"], x["skipped"]) for x in lines(tmp_path / "once")][:2] == [(1, 0), (3, 1)]
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "once").values())
    assert said.count("NonFiniteLossError: 5 steps in a row") == 2, said  # both ranks
    assert list(json.loads((tmp_path / "always" / "non_finite.json").read_text())) == ["4", "5", "6", "7", "8"]
    found = load_checkpoint(tmp_path / "always")
    assert found is not None and all(torch.isfinite(t).all() for t in found[0].values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel", "fsdp", "--lora-rank", "2"], "--lora-rank trains few weights"),
        (["--parallel", "fsdp", "--distill", "--lora-rank", "2"], "--lora-rank trains few weights"),
        (["--parallel", "fsdp", "--distill", "--optimizer", "muon"], "muon needs whole matrices"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_exit_code_2_before_data_are_read(
    tmp_path: Path, source: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(tmp_path / "no data here"), "--out", str(tmp_path / "run")]
    assert main([*command, "--init-from", str(source), *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert words in message and len(message.splitlines()) == 1 and not (tmp_path / "run").exists()
