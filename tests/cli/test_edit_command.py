"""``ecar edit`` from the command line, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import random_model, tiny_config
from ecar.cli.main import main
from ecar.pretrained.folders import save_model
from ecar.tokenizers import PixelTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 12x8 pixels, a picture of that size and a mask of its left third."""
    folder = tmp_path_factory.mktemp("edit")
    save_model(folder / "model", random_model(tiny_config()), PixelTokenizer(factor=1))
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "picture.png")
    mask = np.zeros((8, 12), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def edit(folder: Path, *arguments: object) -> int:
    return main(["edit", *map(str, arguments), "--out", str(folder / "out.png"), "--device", "cpu"])


def test_edit_writes_results_strip_gif_and_a_png_that_can_be_made_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--stages", folder / "strip.png", "--gif", folder / "grow.gif", "--count", "2", "--seed", "5"]
    arguments = [folder / "model", folder / "picture.png", "--class", "Red bird", "--mask", folder / "mask.png"]
    assert edit(folder, *arguments, *more) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    out, picture = Image.open(folder / "out.png"), np.asarray(Image.open(folder / "picture.png"))
    assert json.loads(out.text["ecar"]) == record  # type: ignore[attr-defined]
    assert (record["class"], record["seed"], record["count"], record["strength"]) == ("Red bird", 5, 2, 1.0)
    assert len(record["image_sha256"]) == len(record["mask_sha256"]) == 64 and record["settings"]["steps"] == [3, 2, 2]
    both = np.asarray(out).reshape(8, 2, 12, 3)
    assert out.size == (24, 8) and (both[:, :, 4:] == picture[:, None, 4:]).all()
    assert (both[:, 0, :4] != both[:, 1, :4]).any() and Image.open(folder / "strip.png").width >= 24
    assert Image.open(folder / "grow.gif").n_frames == 3  # type: ignore[attr-defined]
    pixels = out.tobytes()
    assert edit(folder, *arguments[:2], "--class", 2, "--box", "0,0,4,8", "--seed", "5", "--count", "2") == 0
    assert Image.open(folder / "out.png").tobytes() == pixels


def test_every_kind_of_edit_runs(folder: Path) -> None:
    for kind in (["--strength", "0.4"], ["--expand", "2,0,2,0"], ["--upscale", "2"], ["--upscale", "4"]):
        assert edit(folder, folder / "model", folder / "picture.png", "--class", "dog", *kind) == 0, kind
        assert Image.open(folder / "out.png").size == (12, 8)


def test_wrong_input_is_one_line_and_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [folder / "model", folder / "picture.png"]
    for arguments, words in (
        (given, "a strength below 1"),
        ([*given, "--strength", "2"], "strength must be above 0"),
        ([*given, "--box", "0,0,4,8", "--class", "dgo"], "did you mean dog"),
        ([*given, "--box", "0,0,4,8", "--mask", folder / "mask.png"], "--mask and --box do not go together"),
        ([*given, "--upscale", "2", "--strength", "0.5"], "--upscale and --strength do not go together"),
        ([*given, "--upscale", "3"], "2 or 4 times"),
        ([*given, "--box", "0,0,4"], "four numbers"),
        ([*given, "--box", "0,0,40,8"], "does not lie in the picture of 12x8"),
        ([*given, "--expand", "1,2"], "--expand takes four numbers"),
        ([*given, "--strength", "0.5", "--count", "0"], "--count must be at least 1"),
        ([folder / "model", folder / "nowhere.png", "--strength", "0.5"], "cannot be read"),
        ([folder / "model", folder / "model" / "config.json", "--strength", "0.5"], "cannot be decoded"),
        ([*given, "--mask", folder / "nowhere.png"], "cannot be read"),
        ([*given, "--strength", "0.5", "--stages", folder / "out.png"], "--out and --stages are both"),
        ([1, 2, 3, "--strength", "0.5"], "takes [MODEL] IMAGE"),
        (["no/model", folder / "picture.png", "--strength", "0.5"], "no such folder"),
    ):
        assert edit(folder, *arguments) == 2, arguments
        message = capsys.readouterr().err.strip()
        assert words in message and len(message.splitlines()) == 1, (arguments, message)
