"""Encoding, sampling and evaluation in several real processes: the bytes of one, also after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import several
import torch

from conftest import random_model, tiny_config
from ecar.evaluation.samples import Samples, read_samples, write_samples
from ecar.pretrained.folders import save_model
from ecar.processes.world import World
from ecar.tokenizers import ConvTokenizer, PixelTokenizer

TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), PixelTokenizer(factor=1)
    tokenizer.measured = True
    save_model(folder, random_model(tiny_config(tokenizer=tokenizer.fingerprint())), tokenizer)
    return folder


def sample(model: Path, out: Path) -> list[str]:
    """19 batches of 3 images, the last one of 3."""
    words = ["sample", str(model), "--per-class", "19", "--batch-size", "3", "--out", str(out), "--device", "cpu"]
    return [*words, "--guidance", "1.5"]


def encode(data: Path, tokenizer: Path, out: Path) -> list[str]:
    """Eight shards of 16 rows, the last one of 8."""
    words = ["encode", "--data", str(data), "--tokenizer", str(tokenizer), "--out", str(out), "--device", "cpu"]
    return [*words, "--resolution", "8", "--shard-size", "16", "--batch-size", "5", "--flip"]


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_two_and_four_processes_write_what_one_does_killed_or_not(
    digits_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = tmp_path / "tokenizer"
    made = ConvTokenizer(factor=2, widths=(4, 8), depth=1)
    made.save(tokenizer)
    data = Path(shutil.copytree(digits_folder, tmp_path / "data"))
    (data / "one" / "7.png").write_bytes(b"no image")
    jobs: list[dict[str, object]] = []
    for size in (1, 2, 4):
        jobs.append({"world": size, "words": sample(model_folder, tmp_path / f"{size}.npz")})
        jobs.append({"world": size, "words": encode(data, tokenizer, tmp_path / f"cache{size}")})
    for size, kill, then in ((2, 1, 4), (4, 0, 1)):  # of two the second, of four the first; then other numbers go on
        words = (
            sample(model_folder, tmp_path / f"killed{size}.npz"),
            encode(data, tokenizer, tmp_path / f"killed{size}"),
        )
        jobs += [{"world": size, "words": w, "kill": kill} for w in words] + [
            {"world": then, "words": w} for w in words
        ]
    codes, said = several.start(jobs, tmp_path)
    for job, found in zip(jobs, codes, strict=True):
        if "kill" in job:
            assert found.pop(int(str(job["kill"]))) == -signal.SIGKILL and set(found) == {75}, (job, said)
        else:
            assert set(found) == {0}, (job, said)
    whole = (tmp_path / "1.npz").read_bytes()
    assert [(tmp_path / f"{name}.npz").read_bytes() == whole for name in (2, 4, "killed2", "killed4")] == [True] * 4
    assert not list(tmp_path.glob("*.parts"))
    cache = contents(tmp_path / "cache1")
    assert {"cache.json", "shard_00007.safetensors", "tokenizer/config.json"} < cache.keys() and len(cache) == 11
    for name in ("cache2", "cache4", "killed2", "killed4"):
        assert contents(tmp_path / name) == cache
    samples = read_samples(tmp_path / "1.npz")
    assert samples.labels is not None and samples.labels.tolist() == [c for c in range(3) for _ in range(19)]
    records = [json.loads(line) for line in said.splitlines() if line.startswith('{"model"')]
    assert [record["processes"] for record in records] == [1, 2, 4, 4, 1]  # of each command one record
    assert [record["resumed"] > 0 for record in records] == [False] * 3 + [True] * 2
    for doing in ("while sampling, finished batches stay", "while encoding, finished shards stay"):
        assert said.count(f"ecar: stopped {doing}; the same command goes on") == 4


@pytest.mark.slow
def test_an_evaluation_in_two_processes_is_that_of_one_and_says_once_what_is_wrong(
    digits_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    common = ["evaluate", "--model", str(model_folder), "--data", str(digits_folder), "--num", "12", "--allow-small"]
    common += ["--device", "cpu", "--batch-size", "5", "--cache", str(tmp_path / "cache")]
    refused = [*common, "--out", str(tmp_path / "x.json"), "--train-data", str(tmp_path / "none")]
    nothing = ["encode", "--data", str(tmp_path / "gone"), "--tokenizer", "pixels:2", "--out", str(tmp_path / "c")]
    jobs = [{"world": size, "words": [*common, "--out", str(tmp_path / f"{size}.json")]} for size in (1, 2)]
    jobs += [
        {"world": 2, "words": refused},
        {"world": 2, "words": [*nothing, "--device", "cpu"]},
        {"world": 2, "words": ["sample", str(model_folder), "--out", str(tmp_path / "x.png")]},
    ]
    codes, said = several.start(jobs, tmp_path)
    assert codes[:2] == [[0], [0, 0]] and all(2 in some for some in codes[2:]), said
    one, two = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2))
    assert one["metrics"] == two["metrics"] and one["samples"] == two["samples"]
    files = [(tmp_path / f"{size}.samples" / "samples.npz").read_bytes() for size in (1, 2)]
    assert files[0] == files[1]
    assert said.count("none: no such file or folder") == 1
    assert said.count("gone: no such file or folder") == 1
    assert "several processes write one array" in said


@pytest.mark.slow
def test_when_one_process_of_torchrun_is_killed_all_end_and_one_process_goes_on(
    model_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(several.__file__).parent)!r})\nimport several\n"
        "if os.environ.get('RANK') == '1': several.killed_in_its_second_file()\nsys.exit(several.main(sys.argv[1:]))\n"
    )
    words, environment = sample(model_folder, tmp_path / "x.npz"), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", "2", str(script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Signal 9 (SIGKILL)" in done.stdout + done.stderr, done.stdout + done.stderr
    there = len(list((tmp_path / "x.npz.parts").glob("ids_*.npz")))
    assert there > 1 and not (tmp_path / "x.npz").exists()
    done = subprocess.run([sys.executable, "-m", "ecar", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["resumed"] == 3 * there
    assert len(read_samples(tmp_path / "x.npz").images) == 57


def test_shares_are_all_of_the_work_once_and_differ_by_one_at_most() -> None:
    for count in range(12):
        shares = [World(rank, 5).share(range(count)) for rank in range(5)]
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_images_of_an_npz_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (1003, 3, 2, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for labels in (None, torch.arange(1003)):
        samples = Samples(images, labels)
        write_samples(tmp_path / "x.npz", samples)
        with np.load(tmp_path / "x.npz") as file:  # numpy takes it for its own
            assert sorted(file.files) == ["arr_0"] + ([] if labels is None else ["labels"])
        again = read_samples(tmp_path / "x.npz")
        assert torch.equal(again.images, images) and again.fingerprint() == samples.fingerprint()
