"""Editing: parts of a known picture are drawn anew, a picture goes part of the way back, or finer stages are added.

An ``Edit`` is made once for a picture and serves any seeds: ``known`` goes to ``advance`` stage by stage, ``finish``
takes the decoded images. Rows of edits and of plain generation share batches (``Known.join``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecar.config import Side
from ecar.files.images import fit
from ecar.network.model import StageModel
from ecar.sampling.canvas import Canvas, Enlarged, Mask
from ecar.sampling.known import Known
from ecar.sampling.noise import StageNoise
from ecar.sampling.pictures import to_uint8
from ecar.stages import Stage, end_point, noises, pyramid, start_point
from ecar.tokenizers import Tokenizer


@dataclass(frozen=True)
class Edit:
    """What sampling needs to know of a picture.

    Attributes:
        plan: the model's stages.
        latent: z_S* of the picture, (1, C, h_S, w_S), unit scale.
        begin: for every stage (1, 1, h_k, w_k), the time from which a position is drawn, see ``begin_maps``.
        canvas: what the drawn images are laid into; None: they stand alone.
    """

    plan: tuple[Stage, ...]
    latent: Tensor
    begin: tuple[Tensor, ...]
    canvas: Canvas | Enlarged | None = None

    def known(self, noise: Sequence[StageNoise]) -> list[Known]:
        """The known path of every stage, with the noise of the B seeds that sampling uses too."""
        own = noises(self.plan, [draws.fresh for draws in noise])
        maps = pyramid(self.latent, len(self.plan))
        result = []
        for stage, z, n, begin in zip(self.plan, maps, own, self.begin, strict=True):
            rows = len(n)
            ends = start_point(stage, z, n), end_point(stage, z, n)
            result.append(Known(*ends, begin.expand(rows, -1, -1, -1), (float(begin.min()),) * rows))
        return result

    def finish(self, images: Tensor) -> list[Image.Image]:
        """Decoded images (B, 3, H, W) in [-1, 1] -> pictures, with every kept pixel of the input as it was."""
        arrays = to_uint8(images)
        if self.canvas is not None:
            arrays = self.canvas.composite(arrays)
        return [Image.fromarray(array) for array in arrays]


def redrawn(picture: Image.Image, side: Side, mask: Mask | None, strength: float) -> Canvas:
    """What ``redrawing`` takes: the canvas, checked, on which is drawn what ``mask`` covers (None: everything). Needs
    neither torch nor a model.

    Raises:
        ValueError: a strength outside (0, 1], a mask that does not fit or is empty, or nothing kept at strength 1.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    canvas = Canvas.of(picture, side, mask)
    if canvas.everything and strength == 1:
        raise ValueError(
            "nothing of the picture would be kept: give a mask of a part, or a strength below 1 (0.5 keeps the layout)"
        )
    return canvas


def redrawing(model: StageModel, tokenizer: Tokenizer, canvas: Canvas, strength: float) -> Edit:
    """Draw a part of a canvas from ``redrawn`` anew, from ``strength`` on."""
    # At strength 1 what is hidden must not matter, and the encoder would see it through the border.
    return _edit(model, tokenizer, canvas, canvas.filled() if strength == 1 else canvas.pixels, strength)


def expanding(model: StageModel, tokenizer: Tokenizer, picture: Image.Image, margins: Sequence[int]) -> Edit:
    """Draw margins (left, top, right, bottom; in pixels of the picture) around it, which is scaled down for them.

    Raises:
        ValueError: see ``Canvas.with_margins``.
    """
    canvas = Canvas.with_margins(picture, model.config.image_side, margins, tokenizer.factor)
    return _edit(model, tokenizer, canvas, canvas.filled(), 1.0)


def enlarging(model: StageModel, tokenizer: Tokenizer, picture: Image.Image, factor: int) -> Edit:
    """Draw the last stages, one for each doubling, of a picture ``factor`` times smaller than the model's images.

    The picture is scaled to a ``factor``-th of the model's size and enlarged bicubically. Drawing begins in the middle
    of the first of these stages; the result keeps the picture's low band.

    Raises:
        ValueError: a factor other than 2 and 4, a model without that many stages, or a picture that is too small.
    """
    if factor not in (2, 4):
        raise ValueError(f"a picture is enlarged 2 or 4 times, not {factor}")
    finer, stages = factor.bit_length() - 1, len(model.plan)
    if stages < finer:
        raise ValueError(f"enlarging {factor} times draws {finer} stages, and this model has {stages}")
    height, width = (side // factor for side in model.config.image_side)
    if picture.width < width or picture.height < height:
        raise ValueError(
            f"the picture is too small: {picture.width}x{picture.height} pixels, and enlarging {factor} times to the "
            f"model's size starts from {width}x{height}"
        )
    canvas = Enlarged(fit(picture, height, width), factor)
    times = (1.0,) * (stages - finer) + (0.5,) + (0.0,) * (finer - 1)
    begin = tuple(torch.full((1, 1, *stage.side), time) for stage, time in zip(model.plan, times, strict=True))
    return Edit(model.plan, _encode(model, tokenizer, canvas.plain()), begin, canvas)


def begin_maps(plan: Sequence[Stage], drawn: np.ndarray, strength: float) -> tuple[np.ndarray, ...]:
    """For every position of every stage the time in [0, 1] from which it is drawn, (h_k, w_k) each: 0 is the whole
    stage, 1 nothing of it.

    All stages lie on one axis, each as long as the share of data that it adds, b_k - a_k. The last part of that axis,
    of the relative length ``strength``, is drawn. A position of which only a part is in ``drawn`` (H, W) is drawn at
    that part of the strength (as in 2306.00950): the more of its pixels are known, the longer it follows the known
    path. The middle of the hole comes first.
    """
    return tuple(_begin(plan, stage, strength * _covered(drawn, stage.side)) for stage in plan)


def _begin(plan: Sequence[Stage], stage: Stage, strength: np.ndarray) -> np.ndarray:
    lengths = [s.end - s.start for s in plan]
    left = strength * sum(lengths) - sum(lengths[stage.index + 1 :])
    return np.round(1 - np.clip(left / lengths[stage.index], 0, 1), 9)  # whole stages exactly


def _covered(drawn: np.ndarray, side: Side) -> np.ndarray:
    """The share of pixels of each position that are True, (h, w); ``side`` divides the size of ``drawn``."""
    (height, width), (h, w) = drawn.shape, side
    return drawn.reshape(h, height // h, w, width // w).mean((1, 3))


def _edit(model: StageModel, tokenizer: Tokenizer, canvas: Canvas, pixels: np.ndarray, strength: float) -> Edit:
    maps = begin_maps(model.plan, canvas.drawn, strength)
    begin = tuple(torch.from_numpy(times).float()[None, None] for times in maps)
    return Edit(model.plan, _encode(model, tokenizer, pixels), begin, canvas)


def _encode(model: StageModel, tokenizer: Tokenizer, pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, C, h, w), on the CPU, where the noise of the seeds is drawn."""
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(model.device).float() / 127.5 - 1
    tokenizer.check_images(images)
    return tokenizer.encode(images).cpu()
