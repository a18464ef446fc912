"""Tensors -> pictures: grids, the strip of stages, GIFs, and PNG metadata."""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded.

    Raises:
        ValueError: values that are not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("the model produced values that are not finite; its weights are damaged or diverged")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> PIL images."""
    return [Image.fromarray(array) for array in to_uint8(images)]


def from_decoded(images: Tensor) -> Tensor:
    """A tokenizer's output (B, 3, H, W) in [-1, 1] -> uint8, rounded as in every picture that is written."""
    return channels_first(to_uint8(images.float()))


def from_pil(images: list[Image.Image]) -> Tensor:
    """PIL images of one size -> (B, 3, H, W) uint8."""
    return channels_first(np.stack([np.asarray(image) for image in images]))


def channels_first(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) -> (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def about_square(count: int) -> int:
    """Columns of a grid of ``count`` images."""
    return math.ceil(math.sqrt(count))


def grid(images: list[Image.Image], columns: int | None = None, *, scale: int = 1) -> Image.Image:
    """Images of one size side by side, row by row, enlarged ``scale`` times (nearest)."""
    columns = columns or about_square(len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "black")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def same_size(stages: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """Previews of all stages enlarged to the size of the last."""
    size = stages[-1][0].size
    return [[p.resize(size, Image.Resampling.NEAREST) for p in previews] for previews in stages]


def strip(stages: list[list[Image.Image]], *, scale: int = 1) -> Image.Image:
    """Coarse to fine: a column per stage and a row per image, or the other way where images outnumber stages."""
    enlarged = same_size(stages)
    if len(enlarged[0]) > len(enlarged):
        return grid([preview for previews in enlarged for preview in previews], len(enlarged[0]), scale=scale)
    cells = [previews[row] for row in range(len(enlarged[0])) for previews in enlarged]
    return grid(cells, len(enlarged), scale=scale)


def save_gif(stages: list[list[Image.Image]], path: Path, columns: int | None, *, scale: int = 1) -> None:
    """The grid growing stage by stage; the last frame stays longest."""
    frames = [grid(previews, columns, scale=scale) for previews in same_size(stages)]
    durations = [700] * (len(frames) - 1) + [2500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_png(image: Image.Image, out: Path | BinaryIO, metadata: dict[str, str]) -> None:
    """A PNG whose text chunks carry ``metadata``."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    image.save(out, "PNG", pnginfo=info)
