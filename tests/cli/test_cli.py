"""The command line as a real process: exit codes, one-line errors, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_model, tiny_config
from ecar.cli.pictures import _columns
from ecar.config import SamplingConfig
from ecar.pretrained.folders import bundled_models, save_model
from ecar.tokenizers import PixelTokenizer

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def ecar(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ecar", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, random_model(tiny_config()), PixelTokenizer(factor=1))
    return folder


def test_help_imports_nothing_heavy() -> None:
    """`ecar --help` must answer at once: torch alone takes seconds."""
    code = (
        "import sys; from ecar.cli.main import main; main(['--help']); main(['--version']);"
        "print([m for m in ('torch', 'numpy', 'datasets', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.stdout.splitlines()[-1] == "[]" and "sample" in result.stdout


def test_sample_writes_grid_strip_gif_and_a_png_that_can_be_made_again(model_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "sample",
        model_folder,
        "--classes",
        "dog,Red bird",
        "--per-class",
        "3",
        "--seed",
        "7",
        "--steps",
        "3,2,1",
    ]
    result = ecar(*arguments, "--out", tmp_path / "a.png", "--stages", tmp_path / "s.png", "--gif", tmp_path / "g.gif")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["images"] == 6 and record["settings"]["steps"] == [3, 2, 1]
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (3 * 12 * 3, 2 * 8 * 3)
    assert (
        Image.open(tmp_path / "s.png").size == (3 * 12 * 3, 2 * 8 * 3) and Image.open(tmp_path / "g.gif").n_frames == 3
    )
    told = json.loads(picture.text["ecar"])  # type: ignore[attr-defined]
    again = ecar(
        "sample", told["model"], "--classes", told["classes"], "--per-class", told["per_class"],
        "--seed", told["seed"], "--steps", *told["settings"]["steps"], "--out", tmp_path / "b.png",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), np.asarray(picture))


def test_npz_has_the_arrays_that_evaluators_read(model_folder: Path, tmp_path: Path) -> None:
    result = ecar("sample", model_folder, "--classes", "all", "--per-class", "2", "--out", tmp_path / "x.npz")
    assert result.returncode == 0, result.stderr
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["arr_0"].shape == (6, 8, 12, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["labels"].tolist() == [0, 0, 1, 1, 2, 2]


def test_npz_of_a_model_without_classes_has_no_labels_and_the_name_that_was_asked_for(tmp_path: Path) -> None:
    """All were of class 0, and X.NPZ became X.NPZ.npz."""
    from ecar.cli.main import main

    config = tiny_config(num_classes=0, class_names=())
    save_model(tmp_path / "plain", random_model(config), PixelTokenizer(factor=1))
    assert main(["sample", str(tmp_path / "plain"), "--per-class", "2", "--out", str(tmp_path / "X.NPZ")]) == 0
    assert np.load(tmp_path / "X.NPZ").files == ["arr_0"]


def test_npz_of_a_model_whose_classes_have_no_names_has_labels(tmp_path: Path) -> None:
    from ecar.cli.main import main

    save_model(tmp_path / "plain", random_model(tiny_config(class_names=())), PixelTokenizer(factor=1))
    assert main(["sample", str(tmp_path / "plain"), "--per-class", "2", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == [0, 0, 1, 1, 2, 2]


def wrong_inputs(model: Path, tmp: Path) -> list[tuple[list[object], str]]:
    empty = tmp / "empty"
    empty.mkdir()
    pickled = tmp / "pickled"
    save_model(pickled, random_model(tiny_config()), PixelTokenizer(factor=1))
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "model.pt")
    out = ["--out", tmp / "o.png"]
    train = ["train", "--out", tmp / "run", "--max-steps", "1"]
    return [
        (["sample", model, "--classes", "dgo", *out], "did you mean dog"),
        (["sample", model, "--classes", "9", *out], "0..2"),
        (["sample", model, "--steps", "3,2", *out], "steps needs 3"),
        (["sample", model, "--stages", tmp / "o.png", *out], "give each its own name"),
        (["sample", model, "--scale", "20000", *out], "lower --scale"),
        (["sample", model, "--per-class", "200000", *out], "lower --scale"),
        (["sample", model, "--per-class", "2000", "--gif", tmp / "o.gif", *out], "GIF has no more than 65535"),
        (["sample", model, "--cuda-graphs", "--device", "cpu", *out], "need a CUDA device"),
        (["sample", "no/such/model", *out], "no such folder"),
        (["sample", pickled, *out], "pickle"),
        (["sample", model, "--out", "/proc/nowhere/x.png"], "cannot write there"),
        (["sample", model, "--out", tmp / "x.jpeg"], "must end in"),
        ([*train, "--data", empty], "no images found"),
        ([*train, "--data", tmp], "lies inside --data"),
        (["train", "--data", "", "--out", ""], "one of them is empty"),
        ([*train, "--data", tmp / "missing"], "no such file or folder"),
        ([*train, "--data", empty, "--resolution", "30"], "does not divide"),
        ([*train, "--data", empty, "--preset", "huge"], "--preset 'huge': there is no such model"),
        (["paint"], "unknown command"),
        (["sample", model, "--device", "cuda:99", *out], "cannot be used here"),
        (["info", tmp / "empty"], "no config.json"),
        (["sample", model, "--decoder", "owner/taesd", *out], "these are of pixels"),
    ]


def test_wrong_input_is_one_line_and_exit_code_2(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, for speed; the next test runs two of them for real."""
    from ecar.cli.main import main

    for arguments, words in wrong_inputs(model_folder, tmp_path):
        assert main([str(a) for a in arguments]) == 2, arguments
        message = capsys.readouterr().err.strip()
        assert words in message and len(message.splitlines()) == 1, (arguments, message)
    assert not (tmp_path / "o.png").exists()


def test_wrong_input_as_a_process(model_folder: Path, tmp_path: Path) -> None:
    result = ecar("sample", model_folder, "--classes", "dgo", "--out", tmp_path / "o.png")
    assert result.returncode == 2 and result.stderr == "ecar: unknown class 'dgo'; did you mean dog?\n"
    assert ecar("sample", model_folder, "--stepps", "3").returncode == 2


@pytest.mark.slow
def test_a_killed_trainer_resumes_and_ends_as_if_nothing_happened(digits_folder: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment of a real process, then the same command again."""
    common = [
        "train", "--data", digits_folder, "--tokenizer", "pixels:2", "--resolution", "8", "--preset", "16x2x1+1",
        "--batch-size", "8", "--save-every", "30",
        "--max-steps", "120",
    ]  # fmt: skip
    whole = ecar(*common, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "ecar", *map(str, common), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoints/step_*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "final").exists()
    again = ecar(*common, "--out", tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    files = [tmp_path / run / "final" / "model.safetensors" for run in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", bundled_models())
def test_bundled_model_is_small_described_and_draws(name: str, tmp_path: Path) -> None:
    from ecar.pretrained.folders import BUNDLED

    weights = sum(file.stat().st_size for file in (BUNDLED / name).rglob("*.safetensors"))
    assert weights <= 40 * 2**20 and (BUNDLED / name / "README.md").exists()
    result = ecar("sample", name, "--classes", "0,1,2,3", "--per-class", "1", "--out", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 40  # a picture, not a flat field


@pytest.mark.slow
def test_new_users_folder_trains_resumes_and_samples_by_name(tmp_path: Path) -> None:
    """Three classes of RGB PNGs of mixed sizes, one broken file, one 16-bit, one CMYK."""
    generator = np.random.default_rng(0)
    for index, name in enumerate(("Red", "Green", "Blue")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 60, (16 + 3 * i, 20 + i, 3), dtype=np.uint8)
            pixels[..., index] += 150
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "Red" / "broken.png").write_bytes(b"\x89PNG nothing")
    Image.fromarray(np.full((30, 30), 40_000, np.uint16)).save(tmp_path / "data" / "Green" / "deep.png")
    Image.new("CMYK", (30, 30), (200, 0, 0, 0)).save(tmp_path / "data" / "Blue" / "ink.jpg")
    common = [
        "train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--resolution", "16", "--preset", "32x4x4+4",
        "--batch-size", "16",
    ]  # fmt: skip
    first = ecar(*common, "--max-steps", "10")
    assert first.returncode == 0, first.stderr
    assert "broken.png" in first.stderr
    second = ecar(*common, "--max-steps", "15")
    assert second.returncode == 0, second.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "start" not in line] == [*range(1, 16)]
    assert [line["step"] for line in log if "start" in line] == [0, 10]
    sampled = ecar("sample", tmp_path / "run" / "final", "--classes", "blue,red", "--out", tmp_path / "x.png")
    assert sampled.returncode == 0, sampled.stderr


def test_a_warning_is_one_line_without_its_place_in_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ecar.cli.main import main

    fixed = SamplingConfig(steps=(2, 1, 1), guidance=(1.0,) * 3, solver="euler", fixed_steps=True)
    save_model(tmp_path / "model", random_model(tiny_config(sampling=fixed)), PixelTokenizer(factor=1))
    out = str(tmp_path / "x.png")
    assert main(["sample", str(tmp_path / "model"), "--steps", "1,1,1", "--per-class", "1", "--out", out]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "distilled for" in line]
    assert told == ["WARNING: this model was distilled for (2, 1, 1) euler steps; others give worse images"]


def test_a_sheet_of_one_image_of_each_class_is_no_column() -> None:
    """A hundred classes made a sheet of 256 x 25,600 pixels."""
    assert [_columns(100, 1), _columns(20, 2), _columns(8, 8)] == [10, 2, 3]
