"""Files are written for every user, and one that may not be read is not called missing."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_model, tiny_config
from ecar.cli.main import main
from ecar.data.shards import check_cache, is_cache, load_latents
from ecar.data.source import load_source
from ecar.evaluation.classifier import load_classifier
from ecar.files.records import write_atomically
from ecar.files.tensors import load_weights, write_tensors
from ecar.pretrained.adapters import apply_adapter
from ecar.pretrained.folders import load_model, save_model, weights_fingerprint
from ecar.refine.critic import load_critic
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, load_tokenizer
from ecar.training.engine.checkpoint import find_checkpoint, save_checkpoint

NOBODY = 65534


@contextmanager
def umask(bits: int) -> Iterator[None]:
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def somebody_else() -> Iterator[None]:
    """Root may read everything: the tests of what may not be read act as another user."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user may enter; pytest's own is for its user alone."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        yield Path(temporary)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("bits", [0o022, 0o027, 0o002])
def test_weights_are_as_readable_as_every_other_file(tmp_path: Path, bits: int) -> None:
    """safetensors 0.8 writes 0600 whatever the umask: the server's user could not read what another one trained."""
    config = tiny_config()
    with umask(bits):
        save_model(tmp_path / "model", random_model(config), PixelTokenizer(factor=1))
        ConvTokenizer(widths=(4, 4, 4), depth=1).save(tmp_path / "conv")
        write_tensors(tmp_path / "features.safetensors", {"x": torch.zeros(2)})
        write_atomically(tmp_path / "shard.safetensors", b"x")
        save_checkpoint(tmp_path / "run", 1, {"x": torch.zeros(2)}, {})
    assert modes(tmp_path) == {0o666 & ~bits}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_diffusers_autoencoder_is_as_readable_as_every_other_file(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from ecar.tokenizers.diffusers import DiffusersTokenizer

    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = diffusers.AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    with umask(0o022):
        DiffusersTokenizer(tiny).save(tmp_path / "tokenizer")
    assert modes(tmp_path) == {0o644}


def _model(folder: Path) -> None:
    save_model(folder / "model", random_model(tiny_config()), PixelTokenizer(factor=1))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "configuration of a model": ("model/config.json", lambda f: load_model(f / "model")),
    "weights of a model": ("model/model.safetensors", lambda f: load_model(f / "model")),
    "fingerprint": ("model/model.safetensors", lambda f: weights_fingerprint(f / "model")),
    "folder of a model": ("model", lambda f: load_model(f / "model")),
    "folder around a model": ("outer", lambda f: load_model(f / "outer" / "model")),
    "tokenizer": ("model/tokenizer/tokenizer.safetensors", lambda f: load_tokenizer(f / "model" / "tokenizer")),
    "folder of a tokenizer": ("model/tokenizer", lambda f: load_tokenizer(f / "model" / "tokenizer")),
    "plain weights": ("x.safetensors", lambda f: load_weights(torch.nn.Linear(1, 1), f / "x.safetensors")),
    "critic": ("x.safetensors", lambda f: load_critic(f / "x.safetensors")),
    "classifier": ("x.safetensors", lambda f: load_classifier(f / "x.safetensors", ("a",))),
    "adapter": ("adapter_model.safetensors", lambda f: apply_adapter(random_model(tiny_config()), f, "")),
    "cache": ("cache.json", lambda f: load_latents(str(f))),
    "check of a cache": ("cache.json", lambda f: check_cache(str(f))),
    "is it a cache": ("cache.json", lambda f: is_cache(str(f))),
    "folder of images": ("images", lambda f: load_source(str(f / "images"))),
    "parquet": ("x.parquet", lambda f: load_source(str(f / "x.parquet"))),
    "tar": ("x.tar", lambda f: load_source(str(f / "x.tar"))),
    "tar of a pattern": ("x.tar", lambda f: load_source(str(f / "{x,y}.tar"))),
    "checkpoint": ("checkpoints/step_00000001/state.safetensors", lambda f: find_checkpoint(f)),
}


@pytest.mark.parametrize("what", READERS)
def test_what_may_not_be_read_is_said_to_be_that(folder: Path, what: str) -> None:
    """The reasons were "no such file", "damaged" and "no config.json there"."""
    name, read = READERS[what]
    _model(folder)
    if what == "checkpoint":
        save_checkpoint(folder, 1, {"x": torch.zeros(2)}, {})
    if not (folder / name).exists():
        if "." in name:
            (folder / name).write_bytes(b"something")
        else:
            (folder / name).mkdir()
    (folder / name).chmod(0)
    try:
        with somebody_else(), pytest.raises(ValueError, match=r"[pP]ermission denied"):
            read(folder)
    finally:
        (folder / name).chmod(0o755)


def test_the_command_line_names_the_file_that_may_not_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _model(folder)
    weights = folder / "model" / "model.safetensors"
    weights.chmod(0)
    with somebody_else():
        assert main(["info", str(folder / "model")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(weights) in said and "permission denied" in said


def test_subfolders_that_may_not_be_read_are_listed_as_left_out(folder: Path) -> None:
    """They were passed over without a word."""
    for name in ("open", "closed"):
        (folder / "data" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "data" / name / "image.png")
    (folder / "data" / "closed").chmod(0)
    try:
        with somebody_else():
            source = load_source(str(folder / "data"))
    finally:
        (folder / "data" / "closed").chmod(0o755)
    assert len(source) == 1
    assert source.left_out["folders that cannot be read (Permission denied)"] == ["closed"]
