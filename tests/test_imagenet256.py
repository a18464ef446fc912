"""The recipe of ImageNet: its commands exist, its plan adds up, and scaled down it runs in two processes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

import imagenet256
from autoencoder_cost import autoencoder_cost
from ecar.tokenizers import ConvTokenizer
from test_recipes import fields_of

SMALL = [
    "--tokenizer", "pixels:2", "--shard-size", "16", "--resolution", "8", "--preset", "nano", "--stages", "2",
    "--processes", "2", "--batch-size", "8", "--accumulate", "1", "--epochs", "0.2", "--num", "12",
    "--sample-batch", "4", "--steps", "2", "1", "--extractor", "efficientnet-lite0", "--device", "cpu",
]  # fmt: skip


def test_every_command_of_the_recipe_exists_with_its_options() -> None:
    args = imagenet256.options(["--data", "d", "--reference", "r.npz", "--weights", "w", "--max-images", "9"])
    for words in imagenet256.parts(args, 100).values():
        flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert flags <= fields_of(importlib.import_module(f"ecar.cli.{words[0]}").OPTIONS), words
    steps = imagenet256.parts(args, 1_281_167)["train"]
    assert steps[steps.index("--max-steps") + 1] == "100091"  # 80 epochs in batches of 1,024


def test_torchrun_takes_no_option_of_a_command_for_its_own() -> None:
    """--num is short for its --numa-binding."""
    from torch.distributed.run import get_args_parser

    args = imagenet256.options(["--data", "d", "--reference", "r.npz"])
    for words in imagenet256.parts(args, 100).values():
        command = imagenet256.launched(words, 8)
        if words[0] != "push":
            found = get_args_parser().parse_args(command[3:])
            assert (found.module, found.nproc_per_node, found.training_script) == (True, "8", "ecar")
            assert found.training_script_args == words
    assert imagenet256.launched(["train"], 1)[1:] == ["-m", "ecar", "train"]


def test_the_plan_adds_up_and_halves_with_twice_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", "d", "--reference", "r", *SMALL, "--dry-run", "--price", "2", "--tflops", "1e-6"]
    records = []
    for processes in ("2", "4"):
        imagenet256.main([*common, "--autoencoder-tflops", "1e-6", "--processes", processes])
        records.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    one, two = (record["parts"] for record in records)
    assert set(one) == {"encode", "train", "sample", "metrics"}
    assert two["train"]["hours"] == pytest.approx(one["train"]["hours"] / 2, rel=1e-3)
    assert two["metrics"]["hours"] == pytest.approx(one["metrics"]["hours"])  # one process, but all are paid for
    assert two["metrics"]["cost"] == pytest.approx(2 * one["metrics"]["cost"], rel=1e-3)
    assert records[0]["total"]["cost"] == pytest.approx(sum(part["cost"] for part in one.values()), abs=0.01)


def test_the_cost_of_an_autoencoder_is_that_of_its_convolutions() -> None:
    tokenizer = ConvTokenizer(factor=2, widths=(4, 8), depth=1)
    small, large = (autoencoder_cost(tokenizer, (side, side), 2) for side in (16, 32))
    assert large.encode_flops == 4 * small.encode_flops > 0 and large.decode_flops == 4 * small.decode_flops > 0
    weights = 4 * sum(p.numel() for p in tokenizer.parameters())
    assert weights < small.encode_bytes < large.encode_bytes


@pytest.mark.parametrize("wrong", [["--batch-size", "9"], ["--steps", "1"], ["--num", "0"], ["--tflops", "nan"]])
def test_wrong_options_are_refused_before_anything_runs(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        imagenet256.options(["--data", "d", "--reference", "r", *SMALL, *wrong])


@pytest.mark.slow
def test_the_recipe_runs_in_two_processes_from_parquet_as_the_hub_has_it(digits_folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["one", "seven", "zero"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, parity in (("train", 0), ("test", 1)):
        files = [file for file in sorted(digits_folder.rglob("*.png")) if int(file.stem) % 2 == parity]
        rows = {"image": [Image.open(f) for f in files], "label": [names.index(f.parent.name) for f in files]}
        (tmp_path / "data").mkdir(exist_ok=True)
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    out, data = tmp_path / "run", str(tmp_path / "data")
    judged = f"--allow-small --cache {tmp_path / 'cache'}"
    words = [
        "--data",
        data,
        "--reference",
        data,
        *SMALL,
        "--train=--dtype=fp32",
        "--evaluate",
        judged,
        "--out",
        str(out),
    ]
    imagenet256.main(words)
    record = json.loads((out / "evaluate.json").read_text())
    assert record["metrics"]["num"] == 12 and record["metrics"]["against"] == "60 real"
    assert json.loads((out / "latents" / "cache.json").read_text())["images"] == 60
    run = json.loads((out / "model" / "log.jsonl").read_text().splitlines()[0])
    assert run["start"]["options"]["max_steps"] == 2  # a fifth of 60 images, in batches of 8
    assert "FD-EffNetLite0" in (out / "card" / "README.md").read_text()
