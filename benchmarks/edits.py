"""What ``editing.py`` is made of: many pictures edited in one batch, holes, seams, and the sheet that shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ecar import Pipeline
from ecar.config import SamplingConfig, Side
from ecar.evaluation.samples import reconstruct
from ecar.sampling.canvas import Enlarged
from ecar.sampling.edit import Edit, enlarging, redrawing, redrawn
from ecar.sampling.known import Known
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import StageNoise, draw_noise
from ecar.sampling.pictures import from_pil, grid

COVERED = 0.3  # of a picture, by brush strokes
_GREY = 128
_SEEDS = (0, 10**6)  # of the sheet, where the first picture has them


@dataclass(frozen=True)
class Subject:
    """Pictures, and what edits them.

    Attributes:
        images: (N, 3, H, W) uint8.
        labels: class of each, which its edits ask for; None: no class.
        batch: edits that are drawn at once.
    """

    pipe: Pipeline
    settings: SamplingConfig
    images: Tensor
    labels: list[int | None]
    batch: int

    @property
    def side(self) -> Side:
        """(H, W)."""
        return self.pipe.model.config.image_side

    def settings_of(self, edit: Edit) -> SamplingConfig:
        """As in ``Pipeline``, enlarging is not guided."""
        if isinstance(edit.canvas, Enlarged):
            return replace(self.settings, guidance=(1.0,) * len(self.settings.guidance))
        return self.settings

    def enlarges(self, factor: int) -> bool:
        """Whether the model has enough stages to enlarge ``factor`` times."""
        return len(self.pipe.model.plan) >= math.log2(factor)

    def first(self, count: int) -> Subject:
        """The same with the first ``count`` pictures; where there are fewer, they come again."""
        rows = [row % len(self.images) for row in range(count)]
        return Subject(self.pipe, self.settings, self.images[rows], [self.labels[row] for row in rows], self.batch)

    def generate(self) -> Tensor:
        """New pictures of the same classes, with the seeds of the edits, (N, 3, H, W) uint8."""
        seeds = range(len(self.labels))
        return from_pil(self.pipe(self.labels, seeds=seeds, settings=self.settings, batch_size=self.batch).images)

    def rebuild(self) -> Tensor:
        """The pictures through encoder and decoder, (N, 3, H, W) uint8."""
        return reconstruct(self.pipe, self.images).images

    def redrawing(self, masks: Sequence[np.ndarray | None], strength: float = 1.0) -> list[Edit]:
        """Every picture with its mask (H, W), or all of it (None), to be drawn anew: as in ``Pipeline.edit``."""
        model, tokenizer = self.pipe.model, self.pipe.tokenizer
        canvases = [redrawn(to_picture(image), model.config.image_side, mask, strength)
                    for image, mask in zip(self.images, masks, strict=True)]  # fmt: skip
        return [redrawing(model, tokenizer, canvas, strength) for canvas in canvases]

    def enlarging(self, small: Tensor, factor: int) -> list[Edit]:
        """Pictures (N, 3, H / factor, W / factor) uint8, to be enlarged: as in ``Pipeline.upscale``."""
        return [enlarging(self.pipe.model, self.pipe.tokenizer, to_picture(picture), factor) for picture in small]

    @torch.no_grad()
    def draw(self, edits: list[Edit], seed: int = 0) -> Tensor:
        """Edits of the same kind, one of every picture, in batches of different pictures; picture i has the seed
        ``seed`` + i. Returns (N, 3, H, W) uint8."""
        model, pictures = self.pipe.model, list[Image.Image]()
        for first in range(0, len(edits), self.batch):
            some = edits[first : first + self.batch]
            rows = range(first, first + len(some))
            noise = draw_noise([seed + row for row in rows], model.plan, model.config.channels)
            settings = self.settings_of(some[0])
            latents = sample_latents(model, self._ids(rows), noise, settings, known=joined(some, noise))
            decoded = self.pipe.decoder.decode(latents).cpu()
            pictures += [edit.finish(image[None])[0] for edit, image in zip(some, decoded, strict=True)]
        return from_pil(pictures)

    def _ids(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self.pipe.class_id(self.labels[row]) for row in rows], device=self.pipe.model.device)


def joined(edits: Sequence[Edit], noise: Sequence[StageNoise]) -> list[Known]:
    """What is known of a batch of edits of the same kind, row i with the noise of row i, by stage."""
    rows = [edit.known([draws.select([row]) for draws in noise]) for row, edit in enumerate(edits)]
    found = [Known.join(parts, [part.start for part in parts]) for parts in zip(*rows, strict=True)]
    return [known for known in found if known is not None]  # all: no row is without


def box(height: int, width: int, place: tuple[int, int, int, int]) -> np.ndarray:
    """(H, W) bool, True in the box (x, y, width, height)."""
    mask, (x, y, across, down) = np.zeros((height, width), dtype=bool), place
    mask[y : y + down, x : x + across] = True
    return mask


def strokes(height: int, width: int, seed: int, share: float = COVERED) -> np.ndarray:
    """(H, W) bool: strokes of a round brush, a tenth of the smaller side wide, that turn by up to a right angle every
    fifth of it and start anew after four turns. They end with the segment that brings them to ``share``."""
    draws, side = np.random.default_rng(seed), min(height, width)
    image, radius, segment = Image.new("1", (width, height)), max(1, side // 20), side / 5
    pen, x, y, angle, turns = ImageDraw.Draw(image), 0.0, 0.0, 0.0, 0
    while np.asarray(image).mean() < share:
        if turns % 5 == 0:
            x, y, angle = draws.uniform(0, width), draws.uniform(0, height), draws.uniform(0, 2 * math.pi)
        angle, turns = angle + draws.uniform(-1, 1) * math.pi / 2, turns + 1
        ends = (x, y, x + segment * math.cos(angle), y + segment * math.sin(angle))
        pen.line(ends, fill=1, width=2 * radius)
        for at in (ends[:2], ends[2:]):
            pen.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), fill=1)
        x, y = ends[2:]
    return np.asarray(image).copy()


def holes(height: int, width: int, count: int) -> dict[str, list[np.ndarray]]:
    """For each of ``count`` pictures a hole of a quarter (the middle), of a half (below), and strokes of its own."""
    quarter = box(height, width, (width // 4, height // 4, width // 2, height // 2))
    half = box(height, width, (0, height // 2, width, height - height // 2))
    free = [strokes(height, width, seed) for seed in range(count)]
    return {"quarter": [quarter] * count, "half": [half] * count, "free_form": free}


def border(image: Tensor, mask: np.ndarray) -> float:
    """Mean |inside - outside| over all neighbours, one inside and one outside of ``mask``, of an image (3, H, W)."""
    values, inside, found = image.float(), torch.from_numpy(mask), list[Tensor]()
    for axis in (-1, -2):
        steps, crosses = values.diff(dim=axis).abs(), inside.int().diff(dim=axis) != 0
        found.append(steps[:, crosses].flatten())
    return float(torch.cat(found).mean())


def laid_in(edits: Sequence[Edit], images: Tensor) -> Tensor:
    """Images (N, 3, H, W) uint8 in the holes of the pictures, with the border of a drawn part."""
    return from_pil([edit.finish(signed(image[None]))[0] for edit, image in zip(edits, images, strict=True)])


def reduced(images: Tensor, factor: int) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, H / factor, W / factor) float32, means of squares of pixels."""
    return F.avg_pool2d(images.float(), factor)


def shrunk(images: Tensor, factor: int) -> Tensor:
    """``reduced`` as pictures, uint8."""
    return reduced(images, factor).round().byte()


def resized(images: Tensor, height: int, width: int, how: Image.Resampling) -> Tensor:
    """Images (N, 3, h, w) uint8 at another size, as Pillow does it."""
    return from_pil([to_picture(image).resize((width, height), how) for image in images])


def signed(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def rms(images: Tensor, others: Tensor) -> Tensor:
    """(N,) root of the mean squared difference of images (N, 3, H, W) of values from 0 to 255."""
    return (images.double() - others.double()).square().mean((1, 2, 3)).sqrt()


def square_inside(image: Tensor, other: Tensor, mask: np.ndarray) -> float:
    """Mean squared difference of two images (3, H, W) where ``mask`` (H, W) is True."""
    return float((image.double() - other.double())[:, torch.from_numpy(mask)].square().mean())


@torch.no_grad()
def over(distance: Callable[[Tensor, Tensor], Tensor], images: Tensor, others: Tensor) -> Tensor:
    """A distance (N,) of images (N, 3, H, W), eight at a time: maps of a network, and float64, take memory."""
    return torch.cat([distance(*pair) for pair in zip(images.split(8), others.split(8), strict=True)])


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def hole_rows(subject: Subject, rows: int) -> list[Tensor]:
    """Of the first pictures, whose holes take turns: original, masked, finished with two seeds, and what was hidden."""
    some = subject.first(min(rows, len(subject.images)))
    kinds = list(holes(*some.side, len(some.images)).values())
    masks = [kinds[row % len(kinds)][row] for row in range(len(some.images))]
    inside, edits = torch.from_numpy(np.stack(masks))[:, None], some.redrawing(masks)
    hidden = [some.images.masked_fill(part, _GREY) for part in (inside, ~inside)]
    columns = [some.images, hidden[0], *(some.draw(edits, seed) for seed in _SEEDS), hidden[1]]
    return [column[row] for row in range(len(masks)) for column in columns]


def enlarged_rows(subject: Subject, factor: int, rows: int) -> list[Tensor]:
    """Of the first pictures: as they are given, enlarged bicubically, drawn with two seeds, and the original."""
    some = subject.first(min(rows, len(subject.images)))
    small = shrunk(some.images, factor)
    plain = [resized(small, *some.side, how) for how in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)]
    columns = [*plain, *(some.draw(some.enlarging(small, factor), seed) for seed in _SEEDS), some.images]
    return [column[row] for row in range(len(some.images)) for column in columns]


def sheet(cells: list[Tensor]) -> Image.Image:
    """Rows of five images (3, H, W) uint8, small ones enlarged to about 128 pixels."""
    return grid([to_picture(cell) for cell in cells], 5, scale=max(1, 128 // cells[0].shape[-1]))
