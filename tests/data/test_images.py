"""Every pixel format has a defined result; bad files are named, skipped and counted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecar.data.rows import choose_rows
from ecar.data.source import ImageReport, ReadOptions, iterate_images, load_source, natural_key
from ecar.files.images import BadImageError, decode_image, fit


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_16_bit_images_are_scaled_not_clipped() -> None:
    """Pillow's own convert turns 40000 into 255."""
    values = np.array([[0, 20000], [40000, 65535]], dtype=np.uint16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(values))))
    assert pixels[..., 0].tolist() == [[0, 78], [156, 255]]


def test_cmyk_palette_alpha_and_grey_become_rgb() -> None:
    red = Image.new("RGB", (4, 4), (250, 5, 5))
    assert np.asarray(decode_image(encoded(red.convert("CMYK"), "TIFF")))[0, 0].tolist() == [250, 5, 5]
    assert np.asarray(decode_image(encoded(red.convert("P"))))[0, 0, 0] > 240
    assert np.asarray(decode_image(encoded(Image.new("L", (2, 2), 7))))[0, 0].tolist() == [7, 7, 7]
    hidden = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(decode_image(encoded(hidden)))[0, 0].tolist() == [255, 255, 255]


def test_of_an_animation_the_first_frame_is_taken_and_what_is_transparent_is_white() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        first = np.asarray(decode_image(moving))[0, 0].astype(int)
        assert np.abs(first - [255, 0, 0]).max() < 10, kind
    grey, palette = Image.new("LA", (2, 2), (0, 0)), Image.new("P", (2, 2), 0)
    for hidden in (encoded(grey), encoded(palette, transparency=0)):
        assert np.asarray(decode_image(hidden))[0, 0].tolist() == [255, 255, 255]


def test_exif_rotation_is_applied() -> None:
    wide = Image.new("RGB", (6, 2))
    exif = wide.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    assert decode_image(encoded(wide, "JPEG", exif=exif)).size == (2, 6)


@pytest.mark.parametrize("data", [b"", b"no image at all", encoded(Image.new("RGB", (64, 64), "red"))[:60]])
def test_empty_text_and_truncated_files_are_bad_images(data: bytes) -> None:
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode_image(data)


def test_fit_crops_the_centre_and_keeps_images_of_the_right_size() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 200
    assert (fit(Image.fromarray(pixels), 4, 4) == 200).all()
    assert np.array_equal(fit(Image.fromarray(pixels), 4, 8), pixels)


def test_classes_are_in_natural_order() -> None:
    assert sorted(["class10", "class2", "Class1"], key=natural_key) == ["Class1", "class2", "class10"]


def read_all(folder: Path, side: int = 8) -> tuple[np.ndarray, np.ndarray, ImageReport, tuple[str, ...]]:
    source, report = load_source(str(folder)), ImageReport()
    batches = list(iterate_images(source, side, side, batch_size=3, report=report))
    return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches]), report, source.class_names


def test_folder_with_a_broken_a_16_bit_and_a_cmyk_file_is_read(tmp_path: Path) -> None:
    for index, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (5 + i, 9), (index * 200, i, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"not an image")
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / "b" / "wide.png")
    Image.new("CMYK", (9, 9)).save(tmp_path / "b" / "ink.tif")
    images, labels, report, names = read_all(tmp_path)
    assert names == ("a", "b") and images.shape == (22, 8, 8, 3)
    assert labels.tolist() == [0] * 10 + [1] * 12  # the broken file shifts no label
    assert report.skipped is not None and len(report.skipped) == 1 and "broken.png" in report.skipped[0]


def test_mostly_broken_folder_stops_with_a_count(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="6 bad images of the first 6"):
        read_all(tmp_path)


def test_unlabelled_folder_has_no_classes(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    _, labels, _, names = read_all(tmp_path)
    assert names == () and labels.tolist() == [0]


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images found"):
        load_source(str(tmp_path))
    with pytest.raises(ValueError, match="no such file or folder"):
        load_source(str(tmp_path / "missing"))
    (tmp_path / "c").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "c" / "x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose images \(such as loose.png\)"):
        load_source(str(tmp_path))


def test_folders_of_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match="holds the splits test, train"):
        load_source(str(tmp_path))


def test_first_images_are_spread_over_the_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    assert set(load_source(str(tmp_path), max_images=10).labels.tolist()) == {0, 1}


def test_a_label_out_of_range_and_a_missing_one_are_named_with_their_row(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    cells = [{"bytes": encoded(Image.new("RGB", (4, 4))), "path": None}] * 3
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for labels, name in (([0, 7, 1], "range"), ([0, None, 1], "missing"), ([0, -1, 1], "none")):
        table = Dataset.from_dict({"image": cells, "label": labels}, features=features)
        named = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
        table = Dataset(table.data, info=table.info.copy()) if name == "missing" else table
        table.info.features = named  # as a damaged file has it: the cast would refuse
        table.to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(ValueError, match=r"label 7 of row 1 is none of the 2 classes"):
        load_source(str(tmp_path / "range.parquet"))
    with pytest.raises(ValueError, match=r"row 1 has no label"):
        load_source(str(tmp_path / "missing.parquet"))
    with pytest.raises(ValueError, match=r"row 1"):
        load_source(str(tmp_path / "none.parquet"))


def test_numbered_files_of_splits_are_kept_apart(tmp_path: Path) -> None:
    """ "train0.parquet" mentioned no split: training saw the test images."""
    datasets = pytest.importorskip("datasets")
    for split, count in (("train", 3), ("test", 2)):
        cells = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)]
        table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
        table.to_parquet(str(tmp_path / f"{split}0.parquet"))
    assert [len(load_source(str(tmp_path), ReadOptions(split=split))) for split in ("train", "test")] == [3, 2]


def test_null_cells_are_skipped_and_splits_kept_apart(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    cells = [{"bytes": encoded(Image.new("RGB", (4, 4))), "path": None}, None]
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for split, label in (("train", 7), ("test", 50_000)):
        (tmp_path / split).mkdir()
        table = Dataset.from_dict({"image": cells, "label": [label, label]}, features=features)
        table.to_parquet(str(tmp_path / split / "0000.parquet"))
    images, _, report, names = read_all(tmp_path)
    assert len(images) == 1 and names == ("7",) and report.skipped == ["row 1: is empty"]
    assert load_source(str(tmp_path), ReadOptions(split="test")).class_names == ("50000",)
    with pytest.raises(ValueError, match="no parquet file of the split 'validation'"):
        load_source(str(tmp_path), ReadOptions(split="validation"))


def test_parquet_in_the_hub_layout_is_read_with_its_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    rows = {
        "img": [{"bytes": encoded(Image.new("RGB", (4, 4), c)), "path": None} for c in ("red", "lime")],
        "label": [1, 0],
    }
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["go", "stop"])})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    for place in (tmp_path, tmp_path / "train.parquet"):
        images, labels, _, names = read_all(place)
        assert names == ("go", "stop") and labels.tolist() == [1, 0]
        assert images[0, 0, 0].tolist() == [255, 0, 0]


def test_an_archive_left_among_the_images_is_not_taken_for_the_data(tmp_path: Path) -> None:
    """The download in the folder of its own unpacked images hid them and their classes."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    (tmp_path / "photos.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"photos\.tar.*cat/0\.png"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("count", [0, -3])
def test_no_images_at_all_are_refused(count: int) -> None:
    """A traceback, in training from a cache."""
    with pytest.raises(ValueError, match="at least 1"):
        choose_rows(10, count)
