"""WebDataset tars: random access without extraction, labels, damage, names that lead outside."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecar.data.source import ImageReport, ReadOptions, iterate_images, load_source
from ecar.data.tars import expand_braces, find_tars
from ecar.files.images import decode_image


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, values: list[int], labels: list[object] | None = None, suffix: str = "cls") -> Path:
    members: dict[str, bytes] = {}
    for i, value in enumerate(values):
        members[f"{path.stem}/{i:03d}.png"] = picture(value)
        if labels is not None:
            text = str(labels[i]) if suffix == "cls" else json.dumps({"label": labels[i], "other": 1})
            members[f"{path.stem}/{i:03d}.{suffix}"] = text.encode()
    return write_tar(path, members)


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_images_and_labels_of_several_shards_come_in_order(tmp_path: Path, suffix: str) -> None:
    shard(tmp_path / "train-0.tar", [10, 20], [1, 0], suffix)
    shard(tmp_path / "train-10.tar", [50], [1], suffix)
    shard(tmp_path / "train-2.tar", [30, 40], [0, 1], suffix)  # natural order: before 10
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for data in (str(tmp_path), str(tmp_path / "train-{0,2,10}.tar"), str(tmp_path / "train-*.tar")):
        source = load_source(data)
        assert [decode_image(source.read(i)).getpixel((0, 0))[0] for i in range(5)] == [10, 20, 30, 40, 50]
        assert source.labels.tolist() == [1, 0, 0, 1, 1] and source.class_names == ("cat", "dog")


def test_class_names_in_the_samples_are_classes(tmp_path: Path) -> None:
    source = load_source(str(shard(tmp_path / "a.tar", [1, 2, 3], ["dog", "cat", "dog"])))
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]


def test_numbers_with_zeros_before_them_stay_names(tmp_path: Path) -> None:
    """ "01" and "1" became one class."""
    source = load_source(str(shard(tmp_path / "a.tar", [1, 2, 3], ["01", "1", "002"], "json")))
    assert len(source.class_names) == 3 and len(set(source.labels.tolist())) == 3


def test_unlabelled_tars_have_no_classes_and_half_labelled_ones_are_refused(tmp_path: Path) -> None:
    assert load_source(str(shard(tmp_path / "a.tar", [1, 2]))).class_names == ()
    write_tar(tmp_path / "b.tar", {"0.png": picture(1), "0.cls": b"3", "1.png": picture(2)})
    with pytest.raises(ValueError, match="1 has no label"):
        load_source(str(tmp_path / "b.tar"))


def test_a_changed_tar_is_not_read_through_its_old_index(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [1, 2])
    assert len(load_source(str(path))) == 2 and (tmp_path / "a.tar.index.json").exists()
    shard(path, [7, 8, 9])
    source = load_source(str(path))
    assert [decode_image(source.read(i)).getpixel((0, 0))[0] for i in range(3)] == [7, 8, 9]


def test_a_cut_tar_is_named_with_the_offset_also_after_it_was_indexed(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [1, 2, 3])
    source = load_source(str(path))
    data = path.read_bytes()
    path.write_bytes(data[:1300])
    with pytest.raises(ValueError, match=r"a\.tar: (damaged or cut off at|ends at) offset \d+"):
        load_source(str(path))
    with pytest.raises(ValueError, match=r"a\.tar: ends at offset \d+"):
        source.read(2)


def test_a_shard_that_vanishes_stops_and_is_no_bad_image(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [1, 2])
    source = load_source(str(path))
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        list(iterate_images(source, 4, 4, batch_size=2, report=ImageReport()))
    with pytest.raises(ValueError, match="no such tar"):
        load_source(str(tmp_path / "a-{0..3}.tar"))


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "a/../../x.png"])
def test_members_that_lead_outside_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data" / "a.tar", {"0.png": picture(1), name: picture(2)})
    with pytest.raises(ValueError, match="leads outside"):
        load_source(str(path))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "data"]


def test_two_images_of_one_sample_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": picture(1), "0.jpg": picture(2)})
    with pytest.raises(ValueError, match="second image"):
        load_source(str(tmp_path / "a.tar"))


def test_braces_expand_with_leading_zeros() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    assert find_tars("no/tar.here") == []


def test_a_broken_image_in_a_tar_is_skipped_and_shifts_nothing(tmp_path: Path) -> None:
    members = {
        "0.png": picture(1),
        "0.cls": b"a",
        "1.png": b"nothing",
        "1.cls": b"b",
        "2.png": picture(3),
        "2.cls": b"b",
    }
    report = ImageReport()
    source = load_source(str(write_tar(tmp_path / "a.tar", members)))
    ((images, labels),) = iterate_images(source, 4, 4, batch_size=8, report=report)
    assert images[:, 0, 0, 0].tolist() == [1, 3] and labels.tolist() == [0, 1]
    assert report.used == 2 and len(report.skipped) == 1 and "a.tar: 1" in report.skipped[0]


def test_a_tar_may_hold_every_format_that_a_folder_may(tmp_path: Path) -> None:
    """GIF, BMP and TIFF were passed over without a word, and their labels with them."""
    members: dict[str, bytes] = {}
    for i, kind in enumerate(("png", "gif", "bmp", "tif", "webp")):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(file, {"tif": "TIFF"}.get(kind, kind.upper()))
        members |= {f"{i}.{kind}": file.getvalue(), f"{i}.cls": str(i % 2).encode()}
    source = load_source(str(write_tar(tmp_path / "mix.tar", members)))
    assert len(source) == 5 and source.labels.tolist() == [0, 1, 0, 1, 0]


def test_dots_in_names_are_no_suffixes_and_side_files_still_pair(tmp_path: Path) -> None:
    """The key ended at the first dot: "Screenshot 2024-01-01 at 10.30.01.jpg" was no image."""
    members = {
        "shots/Screenshot 2024-01-01 at 10.30.01.png": picture(1),
        "shots/Screenshot 2024-01-01 at 10.30.01.cls": b"cat",
        "shots/Screenshot 2024-01-01 at 10.30.02.png": picture(2),
        "shots/Screenshot 2024-01-01 at 10.30.02.json": b'{"label": "dog"}',
        "plain.png": picture(3),
        "plain.cls": b"dog",
        "St. Mary.final.jfif": picture(4),
        "St. Mary.final.cls": b"cat",
    }
    source = load_source(str(write_tar(tmp_path / "a.tar", members)))
    assert [source.class_names[i] for i in source.labels] == ["cat", "dog", "dog", "cat"]
    assert source.path(0).endswith("a.tar: shots/Screenshot 2024-01-01 at 10.30.01")
    again = load_source(str(tmp_path / "a.tar"), ReadOptions(image_column="png"))
    assert len(again) == 3 and again.labels.tolist() == [0, 1, 1]


def test_further_files_of_webdataset_samples_are_no_images_of_their_own_and_are_named(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(2):
        members |= {f"{i}.jpg": picture(i), f"{i}.seg.png": picture(9), f"{i}.cls": b"3", f"{i}.npy": b"x"}
    path = str(write_tar(tmp_path / "a.tar", members))
    for _ in range(2):  # the second time from the index
        source = load_source(path)
        assert [decode_image(source.read(i)).getpixel((0, 0))[0] for i in range(2)] == [0, 1]
        assert source.class_names == ("3",) and source.left_out == {
            "no images": ["a.tar: 0.npy", "a.tar: 1.npy"],
            "further images of samples": ["a.tar: 0.seg.png", "a.tar: 1.seg.png"],
        }
    masks = load_source(path, ReadOptions(image_column="seg.png"))
    assert decode_image(masks.read(1)).getpixel((0, 0))[0] == 9 and masks.class_names == ("3",)


def test_samples_without_a_plain_image_are_refused_until_one_is_named(tmp_path: Path) -> None:
    members = {f"{i}.{name}.png": picture(i) for i in range(2) for name in ("left", "right")}
    path = str(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ValueError, match=r"left\.png, right\.png of '0' may each be the image; name one"):
        load_source(path)
    assert load_source(path, ReadOptions(image_column="left.png")).path(1).endswith("a.tar: 1")


@pytest.mark.parametrize(("column", "names"), [(None, ("1",)), ("caption", ("x", "y")), ("txt", ("t",))])
def test_the_field_of_the_label_can_be_named(tmp_path: Path, column: str | None, names: tuple[str, ...]) -> None:
    members: dict[str, bytes] = {}
    for i, word in enumerate("xy"):
        side = json.dumps({"label": 1, "caption": word}).encode()
        members |= {f"{i}.png": picture(i), f"{i}.json": side, f"{i}.txt": b"t"}
    path = str(write_tar(tmp_path / "a.tar", members))
    assert load_source(path, ReadOptions(label_column=column)).class_names == names
    with pytest.raises(ValueError, match=r"has no label \(author\)"):
        load_source(path, ReadOptions(label_column="author"))


def test_the_folder_of_img2dataset_is_read_and_its_tables_are_named(tmp_path: Path) -> None:
    """Tars with a table of metadata beside each were "archives of several kinds", or the tars vanished."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in ("00000", "00001"):
        members: dict[str, bytes] = {}
        for i in range(2):
            side = json.dumps({"url": "https://x.org/0.jpg", "caption": "x"}).encode()
            members |= {f"{part}{i}.jpg": picture(i), f"{part}{i}.txt": b"x", f"{part}{i}.json": side}
        write_tar(tmp_path / f"{part}.tar", members)
        pq.write_table(pa.table({"url": ["https://x.org/0.jpg"], "caption": ["x"]}), tmp_path / f"{part}.parquet")
        (tmp_path / f"{part}_stats.json").write_text("{}")
    source = load_source(str(tmp_path))
    assert len(source) == 4 and source.class_names == ()
    assert source.left_out["tables without a column of images"] == ["00000.parquet", "00001.parquet"]
    assert source.left_out["no images"] == ["00000_stats.json", "00001_stats.json"]
    pq.write_table(pa.table({"image": [picture(1)]}), tmp_path / "more.parquet")
    with pytest.raises(ValueError, match=r"several kinds, such as more\.parquet \(1\), 00000\.tar \(2\)"):
        load_source(str(tmp_path))
