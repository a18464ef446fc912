"""``ecar data check`` finds what is there, and an odd folder ends in a sentence, not in a loop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecar.cli.main import main
from ecar.data.check import check_images
from ecar.data.source import load_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(noise[i]).save(root / "a" / f"{i}.png")
    (root / "a" / "copy.png").write_bytes((root / "a" / "0.png").read_bytes())
    Image.fromarray(noise[1]).save(root / "b" / "other_file.bmp")
    Image.fromarray(noise[4][:8, :9]).save(root / "b" / "small.png")
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(root / "b" / "deep.png")
    Image.new("CMYK", (40, 40), (10, 200, 0, 0)).save(root / "b" / "ink.jpg")
    Image.new("RGBA", (40, 40), (10, 200, 0, 100)).save(root / "b" / "clear.png")
    frames = [Image.fromarray(noise[5][..., 0] // (i + 1)).convert("P") for i in range(3)]
    frames[0].save(root / "b" / "moving.gif", save_all=True, append_images=frames[1:])
    (root / "b" / "broken.jpg").write_text("not an image")
    (root / "b" / "empty.png").write_bytes(b"")
    return root


def test_check_finds_every_kind_and_says_so_with_its_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["data", "check", str(folder), "--resolution", "32", "--out", str(tmp_path / "report.json")])
    assert exit_code.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    found = {
        kind: sorted(Path(line.split(":")[0]).name for line in lines) for kind, lines in report["findings"].items()
    }
    assert found == {
        "broken": ["broken.jpg", "empty.png"], "tiny": ["small.png"], "16-bit": ["deep.png"], "CMYK": ["ink.jpg"],
        "alpha": ["clear.png"], "palette": ["moving.gif"], "animated": ["moving.gif"], "duplicate": ["copy.png"],
        "same pixels": ["other_file.bmp"], "narrow range": ["clear.png", "deep.png", "ink.jpg"],
    }  # fmt: skip
    assert report["classes"] == {"a": 5, "b": 8} and report["images"] == 13
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["findings"]["broken"] == 2
    for name in ("broken.jpg", "empty.png"):
        (folder / "b" / name).unlink()
    assert main(["data", "check", str(folder)]) == 0


def test_an_animation_damaged_behind_its_first_frame_is_reported_and_does_not_end_the_check(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 40), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:])
    data = (tmp_path / "whole.gif").read_bytes()
    for end in range(len(data) // 2, len(data), 50):
        (tmp_path / f"cut_{end}.gif").write_bytes(data[:end])
    report = check_images(load_source(str(tmp_path)), 32, 32)
    found = {kind: [Path(line.split(":")[0]).name for line in lines] for kind, lines in report.findings.items()}
    assert "whole.gif" in found["animated"] and "broken" not in found
    assert found["damaged after the first frame"] and "whole.gif" not in found["damaged after the first frame"]


def test_same_pixels_in_another_shape_are_no_duplicates_and_equal_names_of_rows_hide_none(tmp_path: Path) -> None:
    pixels = np.arange(3200, dtype=np.uint16).astype(np.uint8)
    Image.fromarray(pixels.reshape(40, 80)).save(tmp_path / "wide.png")
    Image.fromarray(pixels.reshape(80, 40)).save(tmp_path / "tall.png")
    assert not check_images(load_source(str(tmp_path)), 32, 32).findings
    datasets = pytest.importorskip("datasets")
    cell = {"bytes": (tmp_path / "wide.png").read_bytes(), "path": "0.png"}
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [cell, cell]}, features=features)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    assert len(check_images(load_source(str(tmp_path / "rows.parquet")), 32, 32).findings["duplicate"]) == 1


def test_an_image_over_the_pixel_limit_is_broken_not_a_bomb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ecar.data.check import check_images
    from ecar.files import images

    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 40 - 1)
    report = check_images(load_source(str(folder)), 8, 8)
    assert len(report.findings["broken"]) == 12 and "1600" not in report.findings["broken"][-1]
    assert any("has 40x40 pixels, more than 1,599" in line for line in report.findings["broken"])


@pytest.mark.parametrize("arguments", [["data", "repair", "x"], ["data", "check", "no/such/folder/here"]])
def test_wrong_input_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2 and "ecar:" in capsys.readouterr().err


def test_links_that_loop_end_and_every_image_is_read_once(folder: Path) -> None:
    before = len(load_source(str(folder)))
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    assert len(load_source(str(folder))) == before


def test_images_belong_to_the_folder_where_they_are_not_to_a_link_before_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of b became a: its folder was read through the link first, and then "without images"."""
    before = [load_source(str(folder)).path(i) for i in range(len(load_source(str(folder))))]
    (folder / "a" / "more").symlink_to(folder / "b", target_is_directory=True)
    source = load_source(str(folder))
    assert [source.path(i) for i in range(len(source))] == before and source.class_names == ("a", "b")
    assert "more: the same folder as" in capsys.readouterr().err


def test_a_link_to_an_image_that_is_not_there_is_a_bad_image(folder: Path, tmp_path: Path) -> None:
    """As a checkout of git-annex or DVC has them: they were left out without a word, and their class with them."""
    (folder / "c").mkdir()
    (folder / "c" / "0.png").symlink_to(tmp_path / "nowhere.png")
    source = load_source(str(folder))
    assert source.class_names == ("a", "b", "c")
    found = check_images(source, 32, 32)
    assert any("c/0.png" in line for line in found.findings["broken"])


def test_names_that_are_not_utf8_can_be_read_and_printed(folder: Path) -> None:
    data = (folder / "a" / "0.png").read_bytes()
    with open(os.path.join(os.fsencode(folder), b"a", b"caf\xe9.png"), "wb") as file:
        file.write(data)
    source = load_source(str(folder))
    (index,) = [i for i in range(len(source)) if "caf" in source.path(i)]
    assert source.path(index).encode().endswith(b"caf\\xe9.png") and source.read(index) == data


def test_a_class_folder_without_images_is_no_class_and_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty class").mkdir()
    source = load_source(str(folder))
    assert source.class_names == ("a", "b") and source.empty_classes == ("empty class",)
    assert "empty class" in capsys.readouterr().err
