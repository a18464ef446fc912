"""Nothing vanishes or changes its meaning in silence: which files, columns and splits are read, and what is said."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecar.cli import encode
from ecar.cli.main import main
from ecar.data.shards import load_latents
from ecar.data.source import ImageSource, ReadOptions, load_source
from ecar.files.images import decode_image

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def picture(value: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 9), (value, value, value)).save(file, kind)
    return file.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def table(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    """Parquet, with what ``datasets`` writes of its columns where ``features`` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(columns)
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path)
    return path


def cells(*values: int) -> list[dict[str, Any]]:
    return [{"bytes": picture(v), "path": None} for v in values]


def values(source: ImageSource) -> list[int]:
    return [decode_image(source.read(i)).getpixel((0, 0))[0] for i in range(len(source))]


def labels(source: ImageSource) -> list[str]:
    return [source.class_names[i] for i in source.labels]


# Suffixes


def test_what_pillow_reads_is_an_image_whatever_its_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class of .jfif files was none, and other files vanished without a finding."""
    files = {
        **{f"a/{i}.jfif": picture(i, "JPEG") for i in range(3)},
        "b/0.JPG": picture(1, "JPEG"), "b/1.jpe": picture(2, "JPEG"), "b/2.tga": picture(3, "TGA"),
        "b/no_suffix": picture(4), "b/photo.jpg.1": picture(5, "JPEG"), "b/x.img": picture(6, "GIF"),
        "b/notes": "no picture", "b/scan.pdf": b"%PDF-1.4", "b/.hidden.png": picture(), "b/x.h5": b"\x89HDF\r\n\x1a\n",
    }  # fmt: skip
    assert main(["data", "check", str(write(tmp_path / "data", files)), "--resolution", "8"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["classes"] == {"a": 3, "b": 6} and record["images"] == 9
    assert record["left_out"] == {
        "no images": {"count": 3, "names": ["b/notes", "b/scan.pdf", "b/x.h5"]},
        "hidden": {"count": 1, "names": ["b/.hidden.png"]},
    }


def test_a_broken_file_with_a_suffix_of_images_is_broken_not_left_out(tmp_path: Path) -> None:
    source = load_source(str(write(tmp_path, {"a/0.jfif": b"x", "a/1.png": picture()})))
    assert len(source) == 2 and not source.left_out


# Labels


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dataset.json", '{"labels": [["00000/a.png", 6], ["00000/b.png", 2], ["00001/c.png", 6]]}'),
        ("dataset.json", '{"labels": {"00000\\\\a.png": 6, "00000/b.png": 2, "00001/c.png": 6}}'),
        ("metadata.csv", "\ufefffile_name,text,label\n00000/a.png,x,6\n./00000/b.png,y,2\n00001/c.png,z,6\n"),
        ("metadata.csv", "label;file_name\n6;00000/a.png\n2;00000/b.png\n6;00001/c.png\n"),
        ("metadata.jsonl", "".join(
            json.dumps({"file_name": f, "label": v}) + "\n"
            for f, v in (("00001/c.png", 6), ("00000/b.png", 2), ("00000/a.png", 6))
        )),
    ],
)  # fmt: skip
def test_side_files_give_the_labels_and_shard_folders_are_no_classes(tmp_path: Path, name: str, text: str) -> None:
    files = {f"{shard}.png": picture() for shard in ("00000/a", "00000/b", "00001/c")}
    source = load_source(str(write(tmp_path, {**files, name: text})))
    assert source.class_names == ("2", "6") and labels(source) == ["6", "2", "6"] and name in source.note


def test_metadata_in_subfolders_and_a_label_column_that_is_asked_for(tmp_path: Path) -> None:
    rows = '{"file_name": "x.png", "label": "no", "kind": "cat"}\n'
    files = {"a/x.png": picture(), "b/x.png": picture(), "a/metadata.jsonl": rows}
    write(tmp_path, {**files, "b/metadata.jsonl": rows.replace("cat", "dog")})
    source = load_source(str(tmp_path), ReadOptions(label_column="kind"))
    assert labels(source) == ["cat", "dog"]
    with pytest.raises(ValueError, match="no column 'sort' for --label-column among file_name, label, kind"):
        load_source(str(tmp_path), ReadOptions(label_column="sort"))


def test_stylegan_without_labels_is_unlabelled(tmp_path: Path) -> None:
    files = {"00000/a.png": picture(), "00001/b.png": picture(), "dataset.json": '{"labels": null}'}
    assert load_source(str(write(tmp_path, files))).class_names == ()


@pytest.mark.parametrize(
    ("side", "text", "match"),
    [
        ("dataset.json", '{"labels": [["a.png", 1]]}', "no label for 1 of 2 images, such as b.png"),
        ("dataset.json", '{"labels": [["a.png", [0, 1]], ["b.png", [1, 0]]]}', "type list, not class ids"),
        ("dataset.json", "{", "cannot be read"),
        ("metadata.csv", "file_name,label\na.png,x\nb.png,\n", r"row 1 \(b.png\) has no label"),
        ("metadata.csv", "file_name,label\na.png,x\na.png,y\nb.png,x\n", "a.png has two labels"),
        ("metadata.csv", "filename,label\na.png,x\nb.png,y\n", "no column file_name among filename, label"),
        ("metadata.csv", "file_name,category,class_id\na.png,x,1\nb.png,x,1\n", "name one with --label-column"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n[]\n', "line 2 is no object"),
    ],
)
def test_side_files_that_leave_doubt_are_refused(tmp_path: Path, side: str, text: str, match: str) -> None:
    write(tmp_path, {"a.png": picture(), "b.png": picture(), side: text})
    with pytest.raises(ValueError, match=match):
        load_source(str(tmp_path))


def test_side_files_without_labels_change_nothing_and_are_named(tmp_path: Path) -> None:
    rows = '{"file_name": "cat/a.png", "text": "a cat"}\n'
    source = load_source(str(write(tmp_path, {"cat/a.png": picture(), "metadata.jsonl": rows, "dataset.json": "{}"})))
    assert source.class_names == ("cat",)
    assert source.left_out == {"side files without labels": ["dataset.json", "metadata.jsonl"]}


def test_files_that_only_a_side_file_has_are_named(tmp_path: Path) -> None:
    text = "file_name,label\na.png,x\ngone.png,x\n"
    source = load_source(str(write(tmp_path, {"a.png": picture(), "metadata.csv": text})))
    assert source.left_out == {"named in a side file, but not there": ["gone.png"]}


@pytest.mark.parametrize("column", ["target", "kind of animal", "Label"])
def test_a_column_that_names_classes_has_the_labels(tmp_path: Path, column: str) -> None:
    features = {"image": {"_type": "Image"}, column: {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    path = table(tmp_path / "x.parquet", {"image": cells(1, 2), "id": [7, 8], column: [1, 0]}, features)
    assert labels(load_source(str(path))) == ["cat", "dog"]


def test_columns_that_may_each_be_the_labels_are_refused_until_one_is_named(tmp_path: Path) -> None:
    path = str(table(tmp_path / "x.parquet", {"image": cells(1, 2), "target": [1, 0], "category": ["a", "b"]}))
    with pytest.raises(ValueError, match="category, target may each be the labels; name one with --label-column"):
        load_source(path)
    assert labels(load_source(path, ReadOptions(label_column="category"))) == ["a", "b"]


def test_a_table_without_labels_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_source(str(table(tmp_path / "x.parquet", {"image": cells(1), "animal": ["cat"]})))
    assert "no column of labels among image, animal); classes: none" in capsys.readouterr().err


# Columns


def test_image_is_preferred_to_the_mask_before_it(tmp_path: Path) -> None:
    """The first column of images was taken: the model learned masks."""
    path = table(tmp_path / "x.parquet", {"annotation": cells(9), "image": cells(1), "label": [0]})
    assert values(load_source(str(path))) == [1]
    assert values(load_source(str(path), ReadOptions(image_column="annotation"))) == [9]


def test_several_columns_of_images_are_refused_until_one_is_named(tmp_path: Path) -> None:
    path = str(table(tmp_path / "x.parquet", {"left": cells(1), "right": cells(2), "label": cells(3)}))
    with pytest.raises(ValueError, match="left, right, label may each be the images; name one with --image-column"):
        load_source(path)
    assert values(load_source(path, ReadOptions(image_column="right"))) == [2]
    with pytest.raises(ValueError, match="no column 'middle' for --image-column among left, right, label"):
        load_source(path, ReadOptions(image_column="middle"))
    with pytest.raises(ValueError, match="'label' holds images, not labels"):
        load_source(path, ReadOptions(image_column="right", label_column="label"))


# Tables that other libraries wrote


@pytest.mark.parametrize("kind", ["struct", "bytes", "large bytes", "paths", "other words"])
def test_parquet_of_any_library_is_read(tmp_path: Path, kind: str) -> None:
    write(tmp_path, {f"photos/{i}.png": picture(i) for i in range(3)})
    column = {
        "struct": [{"path": f"{i}.png", "bytes": picture(i)} for i in range(3)],
        "bytes": [picture(i) for i in range(3)],
        "large bytes": pa.array([picture(i) for i in range(3)], pa.large_binary()),
        "paths": [f"photos/{i}.png" for i in range(3)],
        "other words": [picture(i) for i in range(3)],
    }[kind]
    names = pa.array(["b", "a", "b"]).dictionary_encode()  # as pandas writes categories
    name = "content" if kind == "other words" else "image"
    path = table(tmp_path / "x.parquet", {"hash": [b"1", b"2", b"3"], name: column, "label": names})
    source = load_source(str(path))
    assert values(source) == [0, 1, 2] and labels(source) == ["b", "a", "b"]


def test_duckdb_and_pandas_write_what_is_read(tmp_path: Path) -> None:
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    frame = pandas.DataFrame({"img": [picture(5), picture(6)], "class": pandas.Categorical(["x", "y"])})
    frame.to_parquet(tmp_path / "pandas.parquet")
    duckdb.sql(f"copy (select * from '{tmp_path}/pandas.parquet') to '{tmp_path}/duckdb.parquet'")
    for name in ("pandas", "duckdb"):
        source = load_source(str(tmp_path / f"{name}.parquet"))
        assert values(source) == [5, 6] and labels(source) == ["x", "y"]


def test_a_folder_with_a_table_of_its_paths_is_read_through_the_table(tmp_path: Path) -> None:
    write(tmp_path, {f"photos/{i}.png": picture(i) for i in range(3)})
    table(tmp_path / "list.parquet", {"file_name": ["photos/2.png", "photos/0.png"], "label": ["x", "y"]})
    source = load_source(str(tmp_path))
    assert values(source) == [2, 0] and labels(source) == ["x", "y"]
    assert source.left_out == {"images that the table does not name": ["photos/1.png"]}


def test_rows_are_read_in_any_order_over_row_groups_and_files(tmp_path: Path) -> None:
    for part in range(3):
        columns = {"image": cells(*range(50 * part, 50 * part + 50))}
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet", row_group_size=17)
    source = load_source(str(tmp_path))
    rows = np.random.default_rng(0).permutation(150).tolist()
    assert values(source) == list(range(150))
    assert [decode_image(source.read(i)).getpixel((0, 0))[0] for i in rows] == rows
    assert load_source(str(tmp_path), max_images=7).chosen.tolist() == values(load_source(str(tmp_path), max_images=7))


def test_addresses_and_columns_of_numbers_are_no_images(tmp_path: Path) -> None:
    path = str(table(tmp_path / "x.parquet", {"url": ["https://x.org/0.png"], "n": [1]}))
    with pytest.raises(ValueError, match=r"no column of images among url \(text\), n \(int64\)"):
        load_source(path)
    with pytest.raises(ValueError, match="'url' holds addresses; download the images first"):
        load_source(path, ReadOptions(image_column="url"))
    with pytest.raises(ValueError, match="'n' holds int64, not images"):
        load_source(path, ReadOptions(image_column="n"))


def test_files_that_differ_say_which_and_how(tmp_path: Path) -> None:
    """An error occurred while generating the dataset."""
    table(tmp_path / "0.parquet", {"image": cells(1), "label": [0]})
    table(tmp_path / "1.parquet", {"image": cells(1)})
    with pytest.raises(ValueError, match=r"1\.parquet: has no column 'label', which 0\.parquet has"):
        load_source(str(tmp_path))
    table(tmp_path / "1.parquet", {"image": cells(1), "label": ["cat"]})
    with pytest.raises(ValueError, match=r"1\.parquet: 'label' is text, but int64 in 0\.parquet"):
        load_source(str(tmp_path))
    (tmp_path / "1.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"1\.parquet: cannot be read as parquet \(Parquet magic"):
        load_source(str(tmp_path))


def test_a_table_of_the_hub_is_read_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {"annotation": datasets.Image(), "img": datasets.Image(), "target": datasets.ClassLabel(names=["b", "a"])}
    rows = {"annotation": cells(9, 9), "img": cells(1, 2), "target": [1, 0]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    plain = datasets.Dataset.from_dict({"picture": [picture(3), picture(4)], "animal": ["x", "y"]})
    for hub, read in ((made, ReadOptions()), (plain, ReadOptions(label_column="animal"))):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, hub=hub, **__: hub)
        source = load_source("owner/name", read)
        assert values(source) == ([1, 2] if hub is made else [3, 4])
        assert labels(source) == (["a", "b"] if hub is made else ["x", "y"])


def test_the_reason_of_an_error_of_the_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fails(*_: Any, **__: Any) -> None:
        cause = ValueError("Couldn't cast\nimage: binary\nbecause column names don't match")
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from cause

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ValueError, match="image: binary because column names don't match"):
        load_source("owner/name")


# Archives beside each other, and splits


def test_splits_are_known_by_all_their_names_and_the_rest_is_named(tmp_path: Path) -> None:
    """training-0.parquet was no part of train, and what was left out was not said."""
    for name, value in (("training-0", 1), ("validation-0", 2), ("extra", 3)):
        table(tmp_path / f"{name}.parquet", {"image": cells(value)})
    source = load_source(str(tmp_path))
    assert values(source) == [1]
    assert source.left_out == {"not of the split train": ["extra.parquet", "validation-0.parquet"]}
    assert values(load_source(str(tmp_path), ReadOptions(split="val"))) == [2]
    with pytest.raises(ValueError, match="no parquet file of the split 'test' among"):
        load_source(str(tmp_path), ReadOptions(split="test"))


def test_data_without_splits_say_so_and_parts_of_splits_are_not_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table(tmp_path / "x.parquet", {"image": cells(1)})
    load_source(str(tmp_path), ReadOptions(split="validation"))
    assert "no name tells its split, so all is read" in capsys.readouterr().err
    with pytest.raises(ValueError, match="parts of splits are for data sets of the Hub"):
        load_source(str(tmp_path), ReadOptions(split="train[:10%]"))


def test_folders_of_splits_beside_other_folders_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}/0.png": picture() for name in ("train", "test", "extra")})
    with pytest.raises(ValueError, match="holds the splits test, train, not classes"):
        load_source(str(tmp_path))


def test_subfolders_with_their_tables_are_shards(tmp_path: Path) -> None:
    """As img2dataset writes files: 00000/ beside 00000.parquet."""
    write(tmp_path, {f"{shard}/{shard}0.png": picture() for shard in ("00000", "00001")})
    for shard in ("00000", "00001"):
        table(tmp_path / f"{shard}.parquet", {"url": ["https://x.org/0.png"], "key": [f"{shard}0"]})
    source = load_source(str(tmp_path))
    assert len(source) == 2 and source.class_names == ()
    assert source.left_out == {"tables without a column of images": ["00000.parquet", "00001.parquet"]}


def test_tables_and_loose_images_are_not_both_the_data(tmp_path: Path) -> None:
    table(write(tmp_path, {"a.png": picture()}) / "b.parquet", {"image": cells(1)})
    with pytest.raises(ValueError, match=r"several kinds, such as b\.parquet \(1\), a\.png \(1\)"):
        load_source(str(tmp_path))


# Names


def test_names_from_macos_are_composed_and_one_class_with_the_same_from_elsewhere(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "über")
    write(tmp_path, {f"{apart}/0.png": picture(), "über/1.png": picture(), "zoo/2.png": picture()})
    source = load_source(str(tmp_path))
    assert source.class_names == ("zoo", "über") and sorted(source.labels.tolist()) == [0, 1, 1]


def test_a_report_is_not_lost_where_the_terminal_has_no_letters_for_a_name(tmp_path: Path) -> None:
    write(tmp_path / "data", {"a/ü.png": picture(), "a/o.png": picture()})
    with open(os.path.join(os.fsencode(tmp_path), b"data", b"a", b"caf\xe9.png"), "wb") as file:
        file.write(b"broken")
    command = [sys.executable, "-m", "ecar.cli.main", "data", "check", str(tmp_path / "data"), "--out", "r.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert ran.returncode == 1 and json.loads(ran.stdout.splitlines()[-1])["findings"] == {
        "broken": 1, "tiny": 2, "narrow range": 2, "duplicate": 1
    }  # fmt: skip
    assert json.loads((tmp_path / "r.json").read_text())["findings"]["duplicate"]


# Verbs


@pytest.mark.parametrize("kind", ["paths", "masks"])
def test_a_table_is_encoded_by_the_columns_that_are_named(tmp_path: Path, kind: str) -> None:
    write(tmp_path, {f"photos/{i}.png": picture(40 * i) for i in range(4)})
    column = [f"photos/{i}.png" for i in range(4)] if kind == "paths" else cells(0, 40, 80, 120)
    columns = {"mask": cells(7, 7, 7, 7), "photo": column, "sort": ["b", "a", "b", "ü"]}
    if kind == "paths":
        del columns["mask"]
    path = table(tmp_path / "x.parquet", columns)
    words = ["--data", str(path), "--tokenizer", "pixels:4", "--resolution", "8", "--device", "cpu"]
    words += ["--image-column", "photo", "--label-column", "sort"]
    encode.run([*words, "--out", str(tmp_path / "cache")])
    assert load_latents(str(tmp_path / "cache"))[0].labels.tolist() == [1, 0, 1, 2]
    record = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert record["data"]["classes"] == {"a": 1, "b": 2, "ü": 1}


def test_training_takes_a_split_and_its_log_says_what_was_read(tmp_path: Path) -> None:
    for name, value in (("train", 1), ("dev", 2)):
        table(tmp_path / "data" / f"{name}.parquet", {"image": cells(*[value] * 4), "target": ["a", "b", "a", "b"]})
    options = {
        "data": tmp_path / "data", "out": tmp_path / "run", "split": "validation", "tokenizer": "pixels:2",
        "resolution": 8, "preset": "nano", "max-steps": 1, "batch-size": 4, "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words]) == 0
    start = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["start"]
    assert start["data"]["left_out"] == {"not of the split validation": 1}
    assert start["data"]["classes"] == {"a": 2, "b": 2} and start["options"]["split"] == "validation"


def test_options_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "photos", {"a.png": picture()}))
    for name in ("image_column", "label_column"):
        with pytest.raises(ValueError, match="leave it out"):
            load_source(folder, ReadOptions(**{name: "x"}))
    words = ["--tokenizer", "pixels:4", "--resolution", "8", "--device", "cpu"]
    encode.run(["--data", folder, "--out", str(tmp_path / "cache"), *words])
    assert main(["data", "check", str(tmp_path / "cache"), "--split", "test"]) == 2
