"""ICC profiles (version 2) made from their numbers."""

from __future__ import annotations

import struct

# Primaries adapted to D50, as XYZ of red, green and blue.
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
_D50 = (0.9642, 1.0, 0.8249)


def srgb_curve(size: int = 1024) -> list[int]:
    """sRGB's curve as 16-bit numbers."""
    places = [i / (size - 1) for i in range(size)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in places]
    return [round(65535 * value) for value in linear]


def rgb_profile(primaries: tuple[tuple[float, ...], ...], curve: list[int] | float) -> bytes:
    """Of a curve table, or of a gamma."""
    curves = {f"{c}TRC".encode(): _curve(curve) for c in "rgb"}
    columns = {f"{c}XYZ".encode(): _xyz(xyz) for c, xyz in zip("rgb", primaries, strict=True)}
    return _profile(b"RGB ", b"XYZ ", {**columns, **curves})


def grey_profile(curve: list[int] | float) -> bytes:
    """Of a curve table, or of a gamma."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(curve)})


def ink_profile() -> bytes:
    """CMYK -> Lab on a grid of two: each ink takes 25 of 100 from the lightness; cyan, 80 from a."""
    table = b""
    for corner in range(16):
        inks = [corner >> 3 & 1, corner >> 2 & 1, corner >> 1 & 1, corner & 1]
        table += bytes((round(255 * (100 - 25 * sum(inks)) / 100), 128 - 80 * inks[0], 128))
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + straight * 4 + table + straight * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, b"prtr")


def _curve(curve: list[int] | float) -> bytes:
    values = [round(curve * 256)] if isinstance(curve, float) else curve
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *values)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def _profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": _xyz(_D50), **tags}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">2I", place + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(
        ">I4sI4s4s4s6H4s4sI4s4sQI3i4s44x", place + len(body), bytes(4), 0x02400000, kind, space, pcs,
        *(2026, 1, 1, 0, 0, 0), b"acsp", bytes(4), 0, bytes(4), bytes(4), 0, 0,
        *(round(v * 65536) for v in _D50), bytes(4),
    )  # fmt: skip
    return header + struct.pack(">I", len(tags)) + table + body
