"""Pictures as their makers saw them: brightness, orientation, colour profiles, transparency; and what is said of it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import profiles
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from ecar.data.check import check_images
from ecar.data.source import load_source
from ecar.files.colour import to_srgb
from ecar.files.images import BadImageError, decode_image

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data)).astype(int)


def float_tiff(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")


@pytest.mark.parametrize("top", [1.0, 1.0001, 1.2, 1.9])
def test_brightness_of_a_float_image_does_not_jump_with_its_maximum(top: float) -> None:
    """Of maximum 1.0 the mean was 127, of 1.0001 it was 0.5: white went from 1 to 255."""
    values = np.full((10, 10), 0.5)
    values[0, 0] = top
    assert pixels(float_tiff(values))[5, 5, 0] == 128
    assert pixels(float_tiff(values * 255))[5, 5, 0] == 128
    assert pixels(float_tiff(values * 65535))[5, 5, 0] == 128


@pytest.mark.parametrize("top", [255, 256, 300, 65_535, 65_536, 90_000])
def test_brightness_of_whole_numbers_does_not_jump_with_their_maximum(top: int) -> None:
    white = 255 if top < 1000 else 65_535
    values = np.full((10, 10), white // 2, np.int32)
    values[0, 0] = top
    found = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert found[5, 5, 0] == 127 and found[0, 0, 0] == 255


def test_floats_of_no_known_range_are_named() -> None:
    """They were scaled by their own maximum: two images of one data set on two scales."""
    with pytest.raises(BadImageError, match=r"values up to 200000 are of no known range; scale them to 0\.\.1"):
        decode_image(float_tiff(np.full((4, 4), 200_000.0)))


def find(folder: Path) -> dict[str, list[str]]:
    found = check_images(load_source(str(folder)), 8, 8).findings
    return {kind: sorted(Path(line.split(":")[0]).name for line in lines) for kind, lines in found.items()}


def test_check_names_images_of_a_tenth_of_their_range_of_another_and_outside_of_it(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    for i in range(3):
        (tmp_path / f"float_{i}.tif").write_bytes(float_tiff(ramp))
    (tmp_path / "float_255.tif").write_bytes(float_tiff(ramp * 255))
    (tmp_path / "signed.tif").write_bytes(float_tiff(ramp * 2 - 1))
    Image.fromarray((ramp * 4095).astype(np.uint16)).save(tmp_path / "twelve_bits.png")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "sixteen_bits.png")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "blank.png")
    Image.fromarray((100 + ramp * 30).astype(np.uint8)).save(tmp_path / "pale.png")
    found = find(tmp_path)
    assert found["narrow range"] == ["blank.png", "twelve_bits.png"]
    assert found["another range"] == ["float_255.tif"] and found["clipped"] == ["signed.tif"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_turned_though_other_exif_cannot_be_written_back(kind: str, orientation: int) -> None:
    """Orientation 6 with an altitude reference of 256, which is a byte, was "broken"."""
    image = Image.fromarray(NOISE).resize((80, 48))
    plain = Image.Exif()
    plain[0x0112] = orientation
    whole = pixels(encoded(image, kind, exif=plain, lossless=True))
    assert whole.shape[:2] == ((80, 48) if orientation > 4 else (48, 80))
    assert np.array_equal(whole, pixels(encoded(image, kind, exif=odd_exif(orientation), lossless=True)))


def odd_exif(orientation: int) -> bytes:
    """Orientation, and GPS with an altitude reference, a byte, that is the short 256."""
    entries = struct.pack(">HHHIHHHHII", 2, 0x0112, 3, 1, orientation, 0, 0x8825, 4, 1, 38)
    gps = struct.pack(">HHHIHHI", 1, 5, 3, 1, 256, 0, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entries + bytes(4) + gps
    read = Image.Exif()
    read.load(exif)
    assert read[0x0112] == orientation and read.get_ifd(0x8825)[5] == 256
    with pytest.raises(ValueError, match="range"):  # as exif_transpose does; else this would guard nothing
        read.tobytes()
    return exif


def test_exif_that_cannot_be_read_is_no_broken_image() -> None:
    image, exif = Image.fromarray(NOISE), Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker" * 10
    exif.get_ifd(0x8825)[6] = 100.0
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = bytearray(encoded(image, kind, exif=exif))
        start = data.index(b"MM\x00*") if kind != "TIFF" else data.index(b"maker")
        for step in range(4, 60):
            bad = bytearray(data)
            bad[start + step] ^= 0xFF
            if kind == "PNG":  # its checksum is right
                place = data.index(b"eXIf")
                length = int.from_bytes(data[place - 4 : place])
                bad[place + 4 + length : place + 8 + length] = zlib.crc32(bad[place : place + 4 + length]).to_bytes(4)
            assert decode_image(bytes(bad)).size in (image.size, image.size[::-1]), (kind, step)


def test_colour_profiles_are_converted_to_srgb() -> None:
    """They were ignored: Display P3, of every iPhone, was up to 60 of 255 off."""
    p3 = profiles.rgb_profile(profiles.DISPLAY_P3, profiles.srgb_curve())
    adobe = profiles.rgb_profile(profiles.ADOBE_RGB, 2.19921875)
    colours = np.array([[237, 132, 45], [100, 197, 82], [200, 60, 70], [128, 128, 128], [12, 20, 30]], np.uint8)
    for profile, primaries, gamma in ((p3, profiles.DISPLAY_P3, 0.0), (adobe, profiles.ADOBE_RGB, 2.19921875)):
        expected = srgb_by_hand(colours, primaries, gamma)
        found = pixels(encoded(Image.fromarray(colours[None]), icc_profile=profile))[0]
        assert np.abs(found - expected).max() <= 3 and np.abs(expected - colours).max() > 20
        for kind in ("JPEG", "WEBP", "TIFF", "AVIF"):
            flat = encoded(
                Image.new("RGB", (32, 32), tuple(colours[1].tolist())), kind, icc_profile=profile, quality=95
            )
            assert np.abs(pixels(flat)[9, 9] - expected[1]).max() <= 8, kind


def srgb_by_hand(colours: np.ndarray, primaries: tuple[tuple[float, ...], ...], gamma: float) -> np.ndarray:
    """(N, 3) of 255 in a space of primaries and gamma (0: sRGB's curve) -> in sRGB."""
    shown = colours / 255
    linear = shown**gamma if gamma else np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(primaries) @ np.linalg.inv(np.array(profiles.SRGB)), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_profiles_of_sRGB_and_none_leave_pixels_as_they_are() -> None:
    """Latent caches from before profiles were read hold the same pixels."""
    image = Image.fromarray(NOISE)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for size in (1024, 256, 64):
        table = profiles.rgb_profile(profiles.SRGB, profiles.srgb_curve(size))
        for profile in (own, table, None):
            assert np.array_equal(pixels(encoded(image, icc_profile=profile)), NOISE)
    plain = Image.open(io.BytesIO(encoded(image, "JPEG", quality=90))).convert("RGB")
    assert np.array_equal(pixels(encoded(image, "JPEG", quality=90, icc_profile=own)), np.asarray(plain))


def test_profiles_of_inks_grey_palettes_and_alpha_are_converted() -> None:
    inks = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF", icc_profile=profiles.ink_profile())
    found = pixels(inks)[0, 0]  # L 75, a -80, b 0: green, where Pillow has (0, 255, 255)
    assert found[0] < 20 and found[1] > 195 and 150 < found[2] < 220
    dark = profiles.grey_profile(1.0)
    for grey in (Image.new("L", (8, 8), 55), Image.new("LA", (8, 8), (55, 255)), Image.new("I;16", (8, 8), 55 * 257)):
        assert np.abs(pixels(encoded(grey, icc_profile=dark))[0, 0] - 128).max() <= 2, grey.mode
    p3 = profiles.rgb_profile(profiles.DISPLAY_P3, profiles.srgb_curve())
    expected = pixels(encoded(Image.new("RGB", (8, 8), (237, 132, 45)), icc_profile=p3))[0, 0]
    assert expected[0] > 250
    clear = Image.new("RGBA", (8, 8), (237, 132, 45, 255))
    clear.putpixel((7, 7), (237, 132, 45, 0))
    found = pixels(encoded(clear, icc_profile=p3))
    assert np.array_equal(found[0, 0], expected) and found[7, 7].tolist() == [255, 255, 255]
    palette = Image.new("RGB", (8, 8), (237, 132, 45)).quantize(4)
    assert np.abs(pixels(encoded(palette, icc_profile=p3))[0, 0] - expected).max() <= 2


def test_a_profile_that_is_broken_or_of_other_pixels_is_ignored_and_named(tmp_path: Path) -> None:
    image = Image.fromarray(NOISE)
    p3 = profiles.rgb_profile(profiles.DISPLAY_P3, profiles.srgb_curve())
    for profile in (
        b"no profile",
        p3[:100],
        p3[:300],
        bytes(len(p3)),
        profiles.ink_profile(),
        profiles.grey_profile(1.8),
    ):
        assert np.array_equal(pixels(encoded(image, icc_profile=profile)), NOISE)
    assert np.array_equal(
        np.asarray(to_srgb(image.convert("CMYK"), p3)), np.asarray(image.convert("CMYK").convert("RGB"))
    )
    (tmp_path / "broken.png").write_bytes(encoded(image, icc_profile=p3[:300]))
    (tmp_path / "phone.png").write_bytes(encoded(image, icc_profile=p3))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "plain.png").write_bytes(encoded(Image.fromarray(NOISE[::-1]), icc_profile=own))
    assert find(tmp_path) == {"colour profile": ["phone.png"], "colour profile ignored": ["broken.png"]}


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_png_with_long_texts_is_an_image(place: str, tmp_path: Path) -> None:
    """Over 1 MB of text, compressed to a few kilobytes, made it "broken"."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("prompt", "ü" * 2_000_000, zip=True)
    for i in range(70):
        info.add_text(f"plain {i}", "y" * 1_100_000 if i < 2 else "y")
    p3 = profiles.rgb_profile(profiles.DISPLAY_P3, profiles.srgb_curve())
    data = encoded(Image.fromarray(NOISE), pnginfo=info, icc_profile=p3)
    if place == "behind":
        first, last = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
        texts = data.index(b"workflow") - 8
        data = data[:texts] + data[first:last] + data[texts:first] + data[last:]
    assert np.array_equal(pixels(data), pixels(encoded(Image.fromarray(NOISE), icc_profile=p3)))
    (tmp_path / "0.png").write_bytes(data)
    assert find(tmp_path) == {"colour profile": ["0.png"]}


def test_a_white_glyph_on_transparency_is_seen_and_a_black_one_too() -> None:
    """Laid over white it was a blank image."""
    for colour, paper in ((255, 0), (240, 0), (0, 255), (128, 255)):
        for mode, value in (("RGBA", (colour,) * 3), ("LA", (colour,))):
            glyph = Image.new(mode, (16, 16), (*value, 0))
            glyph.paste((*value, 255), (4, 4, 12, 12))
            found = pixels(encoded(glyph))
            assert found[8, 8].tolist() == [colour] * 3 and found[0, 0].tolist() == [paper] * 3


def test_a_photograph_of_several_sizes_is_no_animation(tmp_path: Path) -> None:
    """MPO, as cameras write it."""
    image = Image.fromarray(NOISE)
    image.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[image.resize((20, 12))])
    assert Image.open(tmp_path / "camera.jpg").n_frames == 2
    assert find(tmp_path) == {}
