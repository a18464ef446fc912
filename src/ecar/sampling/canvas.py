"""Pictures and masks on the model's canvas: what of a picture is kept, and how a drawn part is laid into it.

Arrays are (H, W, 3) uint8 for pixels and (H, W) bool for masks, True where the model draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ecar.config import Side
from ecar.files.images import fit

Mask = Image.Image | str | Path | np.ndarray | Sequence[int]
"""Where to draw, in pixels of the upright picture: an image of its size (or its file), an array (H, W), or a box
(x, y, width, height).

Of an image that has transparent pixels, these are drawn; of any other, the white ones (128 and more). Of an array, what
is not zero.
"""

_SWEEPS = 16  # of smoothing, on each level of the pyramid
_PROJECTIONS = 3  # of a picture's low band, before what is left is spread


@dataclass(frozen=True)
class Canvas:
    """A picture as the model sees it.

    Attributes:
        pixels: (H, W, 3) uint8.
        drawn: (H, W) bool, where the model draws.
    """

    pixels: np.ndarray
    drawn: np.ndarray

    @classmethod
    def of(cls, picture: Image.Image, side: Side, mask: Mask | None) -> Canvas:
        """An RGB picture scaled to cover ``side`` (height, width), its centre cropped, and the mask with it; without a
        mask everything is drawn.

        Raises:
            ValueError: a mask of another size, without a pixel to draw, or a box that leaves the picture.
        """
        pixels = fit(picture, *side)
        if mask is None:
            return cls(pixels, np.ones(side, dtype=bool))
        asked = _asked(mask, picture.size)
        if not asked.any():
            raise ValueError("the mask is empty: white pixels, or transparent ones, are what is drawn")
        scaled = ImageOps.fit(Image.fromarray(asked.view(np.uint8) * 255), side[::-1], Image.Resampling.BOX)
        drawn = np.asarray(scaled) > 0
        if not drawn.any():
            raise ValueError(f"the mask lies outside the centre of the picture, of which the model sees {_size(side)}")
        return cls(pixels, drawn)

    @classmethod
    def with_margins(cls, picture: Image.Image, side: Side, margins: Sequence[int], least: int) -> Canvas:
        """An RGB picture scaled down so that it fills ``side`` together with margins, which are drawn.

        Args:
            margins: left, top, right and bottom, in pixels of the picture. Where picture and margins have another
                aspect than the canvas, what is missing is added on both sides equally.
            least: pixels of a side of the picture that must be left.

        Raises:
            ValueError: margins below 0, none at all, or so wide that less than ``least`` is left.
        """
        if len(margins) != 4 or min(margins) < 0 or not any(margins):
            raise ValueError(f"margins are 4 numbers (left, top, right, bottom), 0 or more, not all 0; got {margins}")
        (height, width), (left, top, right, bottom) = side, margins
        whole = picture.width + left + right, picture.height + top + bottom
        scale = min(width / whole[0], height / whole[1])
        size = min(width, round(scale * picture.width)), min(height, round(scale * picture.height))
        if min(size) < least:
            raise ValueError(
                f"the picture is too small: {size[0]}x{size[1]} pixels of it would be left on {_size(side)}, and "
                f"{least} are needed; choose smaller margins"
            )
        x = min(width - size[0], round(scale * left + (width - scale * whole[0]) / 2))
        y = min(height - size[1], round(scale * top + (height - scale * whole[1]) / 2))
        pixels, drawn = np.zeros((*side, 3), np.uint8), np.ones(side, dtype=bool)
        inside = slice(y, y + size[1]), slice(x, x + size[0])
        pixels[inside] = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
        drawn[inside] = False
        if not drawn.any():
            raise ValueError(f"margins {tuple(margins)} vanish on {_size(side)} pixels; choose wider ones")
        return cls(pixels, drawn)

    @property
    def everything(self) -> bool:
        """Whether nothing of the picture is kept."""
        return bool(self.drawn.all())

    def filled(self) -> np.ndarray:
        """The pixels with what is drawn replaced by a smooth continuation of what is kept: nothing of it is seen."""
        return _array(continued(_tensor(self.pixels[None]), torch.from_numpy(~self.drawn)))[0]

    def composite(self, images: np.ndarray) -> np.ndarray:
        """Drawn images (B, H, W, 3) uint8 laid into the picture, of which every kept pixel stays as it is.

        Inside the mask, an image takes over the difference that it and the picture have outside, as a smooth surface
        through the border. What the mask hides has no part in it.
        """
        if self.everything:
            return images
        drawn = _tensor(images)
        return _array(drawn + continued(_tensor(self.pixels[None]) - drawn, torch.from_numpy(~self.drawn)))


@dataclass(frozen=True)
class Enlarged:
    """A picture that is to become ``factor`` times as large.

    Attributes:
        pixels: (h, w, 3) uint8.
        factor: 2 or 4.
    """

    pixels: np.ndarray
    factor: int

    def plain(self) -> np.ndarray:
        """Enlarged bicubically, (H, W, 3) uint8, and held to the picture."""
        return self.composite(_array(self._bicubic(_tensor(self.pixels[None]))))[0]

    def composite(self, images: np.ndarray) -> np.ndarray:
        """Drawn images (B, H, W, 3) uint8 with the low band of the picture (back projection).

        The mean of every ``factor`` x ``factor`` pixels is the picture's to half a grey level: details are what was
        drawn, everything else is what was given.
        """
        drawn, given = _tensor(images), _tensor(self.pixels[None])
        for _ in range(_PROJECTIONS):
            drawn = drawn + self._bicubic(given - F.avg_pool2d(drawn, self.factor))
        drawn = drawn.clamp(0, 255)
        mean = F.avg_pool2d(drawn, self.factor)
        # What is left is spread in proportion to the distance from 0 or 255, so that no value leaves the range.
        lower, higher = given / mean.clamp_min(1e-6), (255 - given) / (255 - mean).clamp_min(1e-6)
        down, up = (_repeated(share.clamp(0, 1), self.factor) for share in (lower, higher))
        return _array(torch.where(_repeated(mean, self.factor) > _repeated(given, self.factor),
                                  drawn * down, 255 - (255 - drawn) * up))  # fmt: skip

    def _bicubic(self, values: Tensor) -> Tensor:
        return F.interpolate(values, scale_factor=self.factor, mode="bicubic")


def continued(values: Tensor, known: Tensor) -> Tensor:
    """Values (B, C, H, W) where ``known`` (H, W), elsewhere a smooth surface through their border, from those alone.

    A membrane (Laplace's equation) by a pyramid: means of known values 2 x 2, level by level down to one, and back,
    where each level is smoothed a little (push-pull).
    """
    if bool(known.all()):
        return values
    there = known.to(values.dtype)[None, None]
    values = values * there
    if known.numel() == 1:
        return values
    share = F.avg_pool2d(there, 2, ceil_mode=True)
    means = F.avg_pool2d(values, 2, ceil_mode=True) / share.clamp_min(1e-6)
    coarse = continued(means, share[0, 0] > 0)
    surface = torch.where(known, values, F.interpolate(coarse, known.shape, mode="bilinear"))
    for _ in range(_SWEEPS):
        edged = F.pad(surface, (1, 1, 1, 1), mode="replicate")
        across, along = edged[..., 1:-1, :], edged[..., 1:-1]
        means = (across[..., :-2] + across[..., 2:] + along[..., :-2, :] + along[..., 2:, :]) / 4
        surface = torch.where(known, values, means)
    return surface


def _asked(mask: Mask, size: tuple[int, int]) -> np.ndarray:
    """The mask as (H, W) bool for a picture of ``size`` (width, height)."""
    if isinstance(mask, str | Path):
        mask = _opened(mask)
    if isinstance(mask, Image.Image):
        mask = ImageOps.exif_transpose(mask)
        asked = np.asarray(mask.convert("L")) >= 128
        if mask.has_transparency_data and not (opaque := np.asarray(mask.convert("RGBA"))[..., 3] >= 128).all():
            asked = ~opaque
    elif isinstance(mask, np.ndarray):
        asked = mask != 0
    else:
        return _box(mask, size)
    if asked.shape != size[::-1]:
        shape = "x".join(str(n) for n in asked.shape[::-1])
        raise ValueError(f"the mask is {shape} pixels and the picture {size[0]}x{size[1]}: make them the same size")
    return asked


def _opened(file: str | Path) -> Image.Image:
    try:
        image = Image.open(Path(file).expanduser())
        image.load()
    except Exception as error:  # Pillow raises many types for broken files
        raise ValueError(f"{file}: the mask cannot be read ({error})") from error
    return image


def _box(box: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    if len(box) != 4:
        raise ValueError(f"a box is four numbers (x, y, width, height), got {tuple(box)}")
    x, y, width, height = box
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size[0] or y + height > size[1]:
        raise ValueError(f"box {x},{y},{width},{height} does not lie in the picture of {size[0]}x{size[1]} pixels")
    asked = np.zeros(size[::-1], dtype=bool)
    asked[y : y + height, x : x + width] = True
    return asked


def _size(side: Side) -> str:
    return f"{side[1]}x{side[0]}"


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()


def _repeated(values: Tensor, factor: int) -> Tensor:
    return values.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def _array(images: Tensor) -> np.ndarray:
    return images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
