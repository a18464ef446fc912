"""Parquet and tars become caches: labels, bad rows, going on after an interruption, refusals."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.cli import encode
from ecar.data import encoding
from ecar.data.latents import encode_source
from ecar.data.shards import load_latents
from ecar.data.source import load_source
from ecar.tokenizers import ConvTokenizer

datasets = pytest.importorskip("datasets")


def png(value: int) -> bytes:
    file = io.BytesIO()
    random = np.random.default_rng(value)
    Image.fromarray(random.integers(0, 256, (10, 9, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def parquet(folder: Path, names: list[str] | None) -> Path:
    """Two files of five rows each; row 3 is broken. Labels are class ids with names, or bare words."""
    folder.mkdir()
    words = ["b", "a", "b", "c", "a", "a", "c", "b", "c", "a"]
    for part in range(2):
        rows = range(5 * part, 5 * part + 5)
        label: Any = [words[i] for i in rows] if names is None else [names.index(words[i]) for i in rows]
        feature = datasets.Value("string") if names is None else datasets.ClassLabel(names=names)
        data = {"image": [{"bytes": b"no image" if i == 3 else png(i), "path": None} for i in rows], "label": label}
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict(data, features=features).to_parquet(str(folder / f"train-{part}.parquet"))
    return folder


def tars(folder: Path) -> Path:
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"train-{part}.tar", "w") as archive:
            for i in range(4):
                for suffix, data in (("png", png(4 * part + i)), ("cls", str((i + part) % 3).encode())):
                    info = tarfile.TarInfo(f"{part}{i}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def run(data: Path, out: Path, *more: str) -> None:
    words = ["--resolution", "8", "--shard-size", "3", "--batch-size", "2", "--device", "cpu"]
    encode.run(["--data", str(data), "--out", str(out), "--tokenizer", "pixels:4", *words, *more])


@pytest.mark.parametrize("kind", ["ids", "words", "tars"])
def test_tables_and_tars_give_labels_of_named_classes_without_bad_rows(kind: str, tmp_path: Path) -> None:
    names = ["c", "b", "a"] if kind == "ids" else None
    run(tars(tmp_path / "data") if kind == "tars" else parquet(tmp_path / "data", names), tmp_path / "cache")
    table, _ = load_latents(str(tmp_path / "cache"))
    assert table.class_names == {"ids": ("c", "b", "a"), "words": ("a", "b", "c"), "tars": ("0", "1", "2")}[kind]
    words = "01201201" if kind == "tars" else "babaacbca"  # row 3 of the tables is broken
    assert [table.class_names[i] for i in table.labels.tolist()] == list(words)
    assert len(table.skipped) == (0 if kind == "tars" else 1)


def test_a_row_that_names_a_file_is_read_from_it(tmp_path: Path) -> None:
    """As rows of a folder of images do: they were all called empty."""
    (tmp_path / "0.png").write_bytes(png(0))
    cells = [{"bytes": None, "path": str(tmp_path / "0.png")}, {"bytes": None, "path": str(tmp_path / "1.png")}]
    datasets.Dataset.from_dict({"image": [*cells, None]}).to_parquet(str(tmp_path / "x.parquet"))
    good, gone, empty = [data for _, data in load_source(str(tmp_path / "x.parquet")).encoded()]
    assert good == png(0) and "No such file" in str(gone) and str(empty) == "is empty"


def test_an_interrupted_table_goes_on_to_the_same_bytes_and_refuses_changed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = parquet(tmp_path / "data", None)
    run(data, tmp_path / "whole")
    real = encoding._write_shard

    def dies_at_the_third(out: Path, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        real(out, number, *rest)

    monkeypatch.setattr(encoding, "_write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts")
    monkeypatch.undo()
    run(data, tmp_path / "parts")
    files = sorted(f.name for f in (tmp_path / "whole").glob("*.*"))
    assert "cache.json" in files and len(files) == 5
    for name in files:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    changed = data / "train-1.parquet"
    changed.write_bytes((data / "train-0.parquet").read_bytes())
    with pytest.raises(ValueError, match="source data changed"):
        run(data, tmp_path / "parts")


def test_another_number_of_images_is_another_cache(tmp_path: Path) -> None:
    """A short trial was taken for the whole data set."""
    data = tars(tmp_path / "data")
    run(data, tmp_path / "cache", "--max-images", "5")
    for more in (["--max-images", "6"], []):
        with pytest.raises(ValueError, match="another --out"):
            run(data, tmp_path / "cache", *more)


def test_a_cache_of_which_nothing_is_written_yet_may_be_begun_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option mistyped at first, or data mended since, were refused as another cache."""

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    data = tars(tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "_write_shard", dies)
        run(data, tmp_path / "cache", "--flip")
    (data / "train-1.tar").write_bytes((data / "train-0.tar").read_bytes())
    run(data, tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["plan"]["flip"] is False


def test_colours_are_not_averaged_away_without_a_word(tmp_path: Path) -> None:
    """A grey tokenizer took coloured images, in memory and to shards, and the model drew grey ones."""
    data = parquet(tmp_path / "data", None)
    tokenizer = ConvTokenizer(factor=4, channels=2, image_channels=1, widths=(4, 4, 4), depth=1)
    tokenizer.measure([tokenizer.encode_raw(torch.rand(2, 3, 8, 8))])
    tokenizer.save(tmp_path / "grey")
    with pytest.raises(ValueError, match="coloured"):
        run(data, tmp_path / "cache", "--tokenizer", str(tmp_path / "grey"))
    with pytest.raises(ValueError, match="coloured"):
        encode_source(load_source(str(data)), tokenizer, (8, 8), flip=False)
