"""Streams of parquet and tars: the same cache as with random access, exact after an interruption."""

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
from ecar.data.columns import Columns
from ecar.data.feed import StreamFeed
from ecar.data.latents import encode_source
from ecar.data.shards import image_ids, load_latents
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
def test_a_stream_gives_the_cache_that_random_access_gives(kind: str, tmp_path: Path) -> None:
    names = ["c", "b", "a"] if kind == "ids" else None
    data = tars(tmp_path / "data") if kind == "tars" else parquet(tmp_path / "data", names)
    run(data, tmp_path / "stream", "--streaming")
    run(data, tmp_path / "random")
    (a, _), (b, _) = load_latents(str(tmp_path / "stream")), load_latents(str(tmp_path / "random"))
    rows = torch.arange(len(b))
    assert len(a) == len(b) == (8 if kind == "tars" else 9)
    assert torch.equal(a.batch(0 * rows, rows), b.batch(0 * rows, rows)) and a.tokenizer == b.tokenizer
    assert a.labels.tolist() == b.labels.tolist() and a.class_names == b.class_names and len(a.class_names) == 3
    assert image_ids(tmp_path / "stream") == image_ids(tmp_path / "random")
    assert len(a.skipped) == len(b.skipped) == (0 if kind == "tars" else 1)


def test_a_cut_tar_is_refused_in_a_stream_too(tmp_path: Path) -> None:
    """The cache of what was left of it was complete, with exit code 0."""
    data = tars(tmp_path / "data")
    whole = (data / "train-1.tar").read_bytes()
    (data / "train-1.tar").write_bytes(whole[: len(whole) // 4])
    with pytest.raises(ValueError, match=r"train-1\.tar: damaged or cut off at offset \d+"):
        run(data, tmp_path / "cache", "--streaming")


@pytest.mark.parametrize("first", ["png", "bmp"])
def test_tars_of_several_formats_are_streamed_whole(first: str, tmp_path: Path) -> None:
    """Images of all formats but one were "empty"."""
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as archive:
        for i in range(12):
            file = io.BytesIO()
            suffix = first if i < 9 else {"png": "bmp", "bmp": "png"}[first]
            Image.new("RGB", (9, 10), (20 * i, 0, 0)).save(file, suffix)
            info = tarfile.TarInfo(f"{i:02d}.{suffix}")
            info.size = len(file.getvalue())
            archive.addfile(info, io.BytesIO(file.getvalue()))
    run(tmp_path / "data", tmp_path / "stream", "--streaming")
    run(tmp_path / "data", tmp_path / "random")
    (a, _), (b, _) = load_latents(str(tmp_path / "stream")), load_latents(str(tmp_path / "random"))
    rows = torch.arange(12)
    assert len(a) == len(b) == 12 and torch.equal(a.batch(0 * rows, rows), b.batch(0 * rows, rows))


def test_an_interrupted_stream_goes_on_to_the_same_bytes_and_refuses_changed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = parquet(tmp_path / "data", None)
    run(data, tmp_path / "whole", "--streaming")
    real = encoding._write_shard

    def dies_at_the_third(out: Path, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        real(out, number, *rest)

    monkeypatch.setattr(encoding, "_write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", "--streaming")
    monkeypatch.undo()
    run(data, tmp_path / "parts", "--streaming")
    files = sorted(f.name for f in (tmp_path / "whole").glob("*.*"))
    assert "cache.json" in files and len(files) == 5
    for name in files:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    changed = data / "train-1.parquet"
    changed.write_bytes((data / "train-0.parquet").read_bytes())
    with pytest.raises(ValueError, match="source data changed"):
        run(data, tmp_path / "parts", "--streaming")


def test_a_streamed_row_that_names_a_file_is_read_from_it(tmp_path: Path) -> None:
    """As rows of a folder of images on the Hub do: they were all called empty."""
    (tmp_path / "0.png").write_bytes(png(0))
    cells = [{"bytes": None, "path": str(tmp_path / "0.png")}, {"bytes": None, "path": str(tmp_path / "1.png")}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": [*cells, None]}, features=features).to_iterable_dataset()
    samples = list(StreamFeed("a/b", table, Columns(image="image", label=None), "0", None).samples(0))
    assert samples[0].data == png(0)
    assert "No such file" in str(samples[1].data) and str(samples[2].data) == "is empty"


def test_a_stream_takes_the_first_images_and_no_folder(tmp_path: Path) -> None:
    run(tars(tmp_path / "data"), tmp_path / "cache", "--streaming", "--max-images", "5")
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["images"] == 5
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="leave out --streaming"):
        run(tmp_path / "photos", tmp_path / "other", "--streaming")


def test_another_number_of_images_is_another_cache(tmp_path: Path) -> None:
    """A short trial was taken for the whole data set."""
    data = tars(tmp_path / "data")
    run(data, tmp_path / "cache", "--streaming", "--max-images", "5")
    for more in (["--max-images", "6"], []):
        with pytest.raises(ValueError, match="another --out"):
            run(data, tmp_path / "cache", "--streaming", *more)


def test_labels_that_begin_late_in_a_stream_are_refused_and_none_at_all_are_no_classes(tmp_path: Path) -> None:
    """Labels that came late were dropped without a word."""
    for name, begin in (("late", 7), ("none", 99)):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "train.tar", "w") as archive:
            for i in range(12):
                for suffix, data in (("png", png(i)), ("cls", b"1"))[: 1 + (i >= begin)]:
                    info = tarfile.TarInfo(f"{i:02}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match="00 has no label"):
        run(tmp_path / "late", tmp_path / "cache", "--streaming")
    run(tmp_path / "none", tmp_path / "unlabelled", "--streaming")
    assert load_latents(str(tmp_path / "unlabelled"))[0].class_names == ()


def test_a_cache_of_which_nothing_is_written_yet_may_be_begun_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option mistyped at first, or data mended since, were refused as another cache."""

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    data = tars(tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "_write_shard", dies)
        run(data, tmp_path / "cache", "--streaming", "--flip")
    (data / "train-1.tar").write_bytes((data / "train-0.tar").read_bytes())
    run(data, tmp_path / "cache", "--streaming")
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["plan"]["flip"] is False


def test_names_in_cls_files_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "train.tar", "w") as archive:
        for suffix, data in (("png", png(1)), ("cls", b"cat")):
            info = tarfile.TarInfo(f"0.{suffix}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    run(tmp_path / "data", tmp_path / "cache", "--streaming")
    assert load_latents(str(tmp_path / "cache"))[0].class_names == ("cat",)


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
