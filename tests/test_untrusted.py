"""Weights from strangers: nothing in them is executed, and what is wrong with them is one line and exit code 2."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import random_model, tiny_config
from ecar.cli.main import main
from ecar.pretrained.folders import load_model, save_model
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, load_tokenizer


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", random_model(tiny_config()), PixelTokenizer(factor=1))
    return tmp_path / "model"


def refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``ecar sample`` says of a model."""
    assert main(["sample", str(model), "--device", "cpu", "--out", str(tmp_path / "x.png")]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and not (tmp_path / "x.png").exists()
    return message


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.ckpt"])
def test_a_malicious_pickle_is_not_executed_and_the_message_has_the_command_that_converts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    mark = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(mark)}, folder / name)
    said = [refused(folder, tmp_path, capsys), refused(folder / name, tmp_path, capsys)]
    for line, target in zip(said, (folder / "model.safetensors", "model.safetensors"), strict=True):
        command = f"save_file(torch.load('{folder / name}', weights_only=True), '{target}')"
        assert "never loaded" in line and command in line and not mark.exists()


def test_the_command_that_converts_a_pickle_gives_the_same_weights_and_runs_no_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(before, folder / "model.pt")
    said = refused(folder, tmp_path, capsys)
    code = said[said.index('"import torch') + 1 : said.rindex('"')]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert load_model(folder)
    torch.save({"weight": Payload(tmp_path / "executed")}, folder / "model.pt")
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True).returncode != 0
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer/tokenizer.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "huge header", "empty", "text"])
def test_files_that_are_no_safetensors_are_refused_whatever_they_are_called(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, kind: str
) -> None:
    """A header that claims a terabyte must not be believed."""
    mark = tmp_path / "executed"
    content = {
        "pickle": pickle.dumps(Payload(mark)), "huge header": struct.pack("<Q", 10**12) + b"{}", "empty": b"",
        "text": b"a web page that says that the file is gone",
    }  # fmt: skip
    (folder / file).write_bytes(content[kind])
    assert "not a readable safetensors file" in refused(folder, tmp_path, capsys) and not mark.exists()


def test_missing_extra_and_other_shapes_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "model.safetensors"
    whole = load_file(path)
    name = "head.map_out.bias"
    save_file({k: v for k, v in whole.items() if k != name} | {"of_another": torch.ones(1)}, path)
    message = refused(folder, tmp_path, capsys)
    assert f"missing 1 (such as {name})" in message and "unexpected 1 (such as of_another)" in message
    save_file({**whole, name: torch.ones(7)}, path)
    assert f"{name} is (7,), the configuration asks for" in refused(folder, tmp_path, capsys)


@pytest.mark.parametrize("kind", ["pickle", "damaged", "missing", "shape"])
def test_an_autoencoder_of_diffusers_with_wrong_weights_is_refused_and_not_executed(tmp_path: Path, kind: str) -> None:
    """A missing weight was left as it came: diffusers only warns."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
    ).save_pretrained(tmp_path / "kl")  # fmt: skip
    path = tmp_path / "kl" / "diffusion_pytorch_model.safetensors"
    whole, name = load_file(path), "decoder.conv_in.bias"
    if kind == "pickle":
        path.unlink()
        torch.save({name: Payload(tmp_path / "executed")}, path.with_suffix(".bin"))
    elif kind == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "missing":
        save_file({k: v for k, v in whole.items() if k != name}, path)
    else:
        save_file({**whole, name: torch.ones(7)}, path)
    word = {"pickle": "no file named", "damaged": "cannot be loaded", "missing": f"missing .such as {name}",
            "shape": "expected shape"}[kind]  # fmt: skip
    with pytest.raises(ValueError, match=word):
        load_tokenizer(tmp_path / "kl")
    assert not (tmp_path / "executed").exists()


def test_an_own_tokenizer_with_wrong_weights_is_refused(tmp_path: Path) -> None:
    tokenizer = ConvTokenizer(factor=2, widths=(4, 8), depth=1)
    tokenizer.measure([tokenizer.encode_raw(torch.rand(2, 3, 8, 8))])
    tokenizer.save(tmp_path)
    whole = load_file(tmp_path / "tokenizer.safetensors")
    save_file({k: v for k, v in whole.items() if k != "mean"}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(ValueError, match=r"missing 1 \(such as mean\)"):
        load_tokenizer(tmp_path)


def test_an_array_file_with_objects_is_not_executed(tmp_path: Path) -> None:
    from ecar.evaluation.samples import read_npz

    mark, path = tmp_path / "executed", tmp_path / "samples.npz"
    np.savez(path, arr_0=np.array([Payload(mark)], dtype=object))
    with pytest.raises(ValueError, match=r"not a readable \.npz file"):
        read_npz(path)
    assert not mark.exists()


def test_an_adapter_that_is_a_pickle_is_not_executed(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from ecar.sampling.pipeline import Pipeline

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(folder / "config.json", adapter / "adapter_config.json")
    (adapter / "ecar.json").write_text(json.dumps({"model": {}, "adapter": {}, "base_weights": ""}))
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(ValueError, match="not an adapter of ecar"):
        Pipeline.from_pretrained(folder, adapter=adapter)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "wrong", [{"width": "192"}, {"class_names": None}, {"sampling": {"steps": 5, "guidance": [1.0]}}, {"stages": []}]
)
def test_a_configuration_of_other_types_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any]
) -> None:
    """Each was a traceback."""
    record = json.loads((folder / "config.json").read_text())
    record["model"] |= wrong
    (folder / "config.json").write_text(json.dumps(record))
    assert next(iter(wrong)) in refused(folder, tmp_path, capsys)


@pytest.mark.parametrize("wrong", [[], 5, {"factor": "4"}, {"other": 1}, {"factor": None}, "no widths"])
def test_a_tokenizers_configuration_of_other_types_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: Any
) -> None:
    path = folder / "tokenizer" / "config.json"
    record = json.loads(path.read_text())
    if wrong == "no widths":
        ConvTokenizer(factor=2, widths=(4, 8), depth=1).save(folder / "tokenizer")
        record = json.loads(path.read_text())
        del record["widths"]
    elif isinstance(wrong, dict):
        record |= wrong
    else:
        record = wrong
    path.write_text(json.dumps(record))
    assert "configuration of a tokenizer" in refused(folder, tmp_path, capsys)
