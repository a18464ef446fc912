"""Editing: parts of a known picture are drawn anew, a picture goes part of the way back, or finer stages are added.

An ``Edit`` is made once for a picture and serves any seeds: ``known`` goes to ``advance`` stage by stage, ``finish``
takes the decoded images. Rows of edits and of plain generation share batches (``Known.join``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ecar.config import Side
from ecar.files.images import fit
from ecar.network.model import StageModel
from ecar.sampling.canvas import Canvas, Mask
from ecar.sampling.known import Known
from ecar.sampling.noise import StageNoise
from ecar.sampling.pictures import to_uint8
from ecar.stages import Stage, end_point, noises, pyramid, start_point
from ecar.tokenizers import Tokenizer


@dataclass(frozen=True)
class Edit:
    """What sampling needs to know of a picture.

    Attributes:
        plan: the model's stages of which anything is known, 1 .. j.
        latent: z_j* of the picture, (1, C, h_j, w_j), unit scale.
        masks: m_1 .. m_j, each (1, 1, h_k, w_k): 1 where the model draws.
        begin: for each of them the time from which it draws, see ``begins``.
        canvas: what the drawn images are laid into; None: they stand alone.
        feather: pixels over which the border is feathered.
    """

    plan: tuple[Stage, ...]
    latent: Tensor
    masks: tuple[Tensor, ...]
    begin: tuple[float, ...]
    canvas: Canvas | None = None
    feather: int = 0

    def known(self, noise: Sequence[StageNoise]) -> list[Known]:
        """The known path of every stage, with the noise of the B seeds that sampling uses too."""
        own = noises(self.plan, [draws.fresh for draws in noise[: len(self.plan)]])
        maps = pyramid(self.latent, len(self.plan))
        result = []
        for stage, z, n, mask, begin in zip(self.plan, maps, own, self.masks, self.begin, strict=True):
            rows = len(n)
            ends = start_point(stage, z, n), end_point(stage, z, n)
            result.append(Known(*ends, mask.expand(rows, -1, -1, -1), (begin,) * rows))
        return result

    def finish(self, images: Tensor) -> list[Image.Image]:
        """Decoded images (B, 3, H, W) in [-1, 1] -> pictures, with every kept pixel of the input as it was."""
        arrays = to_uint8(images)
        if self.canvas is not None and not self.canvas.everything:
            arrays = self.canvas.composite(arrays, self.feather)
        return [Image.fromarray(array) for array in arrays]


def redrawing(
    model: StageModel, tokenizer: Tokenizer, picture: Image.Image, mask: Mask | None, strength: float
) -> Edit:
    """Draw what ``mask`` covers (None: everything) anew, from ``strength`` on.

    Raises:
        ValueError: see ``redrawn``.
    """
    return redrawing_on(model, tokenizer, redrawn(picture, model.config.image_side, mask, strength), strength)


def redrawn(picture: Image.Image, side: Side, mask: Mask | None, strength: float) -> Canvas:
    """The part of ``redrawing`` that needs neither torch nor a model: the canvas, checked.

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


def redrawing_on(model: StageModel, tokenizer: Tokenizer, canvas: Canvas, strength: float) -> Edit:
    """``redrawing`` of a canvas from ``redrawn``."""
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
    """Draw the finer stages of a picture that is ``factor`` times smaller than the model's images.

    The picture is scaled to the side that its stage decodes to; its latent is that stage's map.

    Raises:
        ValueError: a factor other than 2 and 4, a model without that many finer stages, or a picture that is too small.
    """
    if factor not in (2, 4):
        raise ValueError(f"a picture is enlarged 2 or 4 times, not {factor}")
    finer, stages = factor.bit_length() - 1, len(model.plan)
    if stages <= finer:
        needed = f"enlarging {factor} times draws {finer} finer stage{'s' * (finer > 1)}"
        raise ValueError(f"{needed}, and a picture needs one more; this model has {stages} in all")
    height, width = (side // factor for side in model.config.image_side)
    if picture.width < width or picture.height < height:
        raise ValueError(
            f"the picture is too small: {picture.width}x{picture.height} pixels, and enlarging {factor} times to the "
            f"model's size starts from {width}x{height}"
        )
    plan = model.plan[: stages - finer]
    masks = tuple(torch.zeros(1, 1, *stage.side) for stage in plan)
    return Edit(plan, _encode(model, tokenizer, fit(picture, height, width)), masks, (1.0,) * len(plan))


def begins(plan: Sequence[Stage], strength: float) -> tuple[float, ...]:
    """For every stage the time in [0, 1] from which it is drawn: 0 is the whole stage, 1 nothing of it.

    All stages lie on one axis, each as long as the share of data that it adds, b_k - a_k. The last part of that axis,
    of the relative length ``strength``, is drawn.
    """
    left = strength * sum(stage.end - stage.start for stage in plan)
    result = []
    for stage in reversed(plan):
        share = min(1.0, max(0.0, left / (stage.end - stage.start)))
        result.append(round(1 - share, 9))  # whole stages exactly
        left -= stage.end - stage.start
    return tuple(reversed(result))


def stage_masks(plan: Sequence[Stage], drawn: np.ndarray) -> tuple[Tensor, ...]:
    """m_1 .. m_S, each (1, 1, h_k, w_k): a position is drawn if any of its pixels in ``drawn`` (H, W) is."""
    pixels = torch.from_numpy(drawn).float()[None, None]
    return tuple(F.adaptive_max_pool2d(pixels, stage.side) for stage in plan)


def _edit(model: StageModel, tokenizer: Tokenizer, canvas: Canvas, pixels: np.ndarray, strength: float) -> Edit:
    latent, masks = _encode(model, tokenizer, pixels), stage_masks(model.plan, canvas.drawn)
    feather = max(1, tokenizer.factor // 2)
    return Edit(model.plan, latent, masks, begins(model.plan, strength), canvas, feather)


def _encode(model: StageModel, tokenizer: Tokenizer, pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, C, h, w), on the CPU, where the noise of the seeds is drawn."""
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(model.device).float() / 127.5 - 1
    tokenizer.check_images(images)
    return tokenizer.encode(images).cpu()
