"""Which tokenizer: measured on held-out pictures, since every later picture goes through it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ecar.fitting.measure import Reconstruction, reconstruct
from ecar.fitting.options import NEW
from ecar.pretrained.folders import bundled_models
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, Tokenizer, bundled_tokenizers, load_tokenizer

GOOD = 21.0  # dB: below, a tokenizer is trained where there is time
POOR = 17.0  # dB: below, pixels themselves are better latents
_LEAST_SIDE, _MOST_SIDE = 8, 32  # of a latent
_MOST_TOKENS = 256
_LARGE = 128  # pixels
_TIME = 600.0  # seconds in all, below which no tokenizer is trained


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and what is to be done with it.

    Attributes:
        name: as ``load_tokenizer`` takes it.
        train: whether it is to be trained further on these pictures.
        measured: pictures through it and back, before that.
        why: in words.
    """

    name: str
    tokenizer: Tokenizer
    train: bool
    measured: Reconstruction
    why: str


def choose_tokenizer(name: str | None, images: Tensor, seconds: float, device: str) -> Tokens:
    """Of the bundled tokenizers that give ``images`` (N, 3, H, W) uint8 back well, the one with the smallest latent.

    Where none does: of all of them, trained further, if there is time; else the best one, or pixels if it is poor.

    Args:
        name: the user's choice, if any.
        seconds: for everything.

    Raises:
        ValueError: no such tokenizer, or sides that do not fit it.
    """
    side = images.shape[-1]
    if name == NEW:
        fresh = ConvTokenizer(image_channels=3, **new_sizes(side))
        return Tokens(NEW, fresh, True, reconstruct(fresh, images, device), "trained from the start, as asked")
    if name is not None:
        tokenizer = load_tokenizer(name)
        measured = reconstruct(tokenizer, images, device)
        return Tokens(name, tokenizer, False, measured, f"as asked; {_decibels(measured, len(images))}")
    found = {name: one for name in _candidates() if (one := _try(name, images, device)) is not None}
    if found:
        good = [name for name in found if found[name][1].psnr >= GOOD]
        if good or seconds >= _TIME:
            best = min(good or found, key=lambda name: (_numbers(found[name][0], side), -found[name][1].psnr))
        else:
            best = max(found, key=lambda name: found[name][1].psnr)
        tokenizer, measured = found[best]
        others = [f"{name} {one[1].psnr:.1f} dB" for name, one in found.items() if name != best]
        words = "; ".join([_decibels(measured, len(images)), *others])
        if measured.psnr >= GOOD:
            return Tokens(best, tokenizer, False, measured, words)
        if seconds >= _TIME:
            return Tokens(best, tokenizer, True, measured, f"{words}; less than {GOOD:g} dB, so it is trained further")
        if measured.psnr >= POOR:
            return Tokens(best, tokenizer, False, measured, f"{words}; too little time to train a better one")
    factor = next((f for f in (1, 2, 4, 8, 16) if side % (2 * f) == 0 and (side // f) ** 2 <= _MOST_TOKENS), 0)
    if not factor:
        raise ValueError(f"--resolution {side} fits no tokenizer; choose a multiple of 32")
    pixels = PixelTokenizer(factor=factor)
    why = "no other fits this side well, and there is too little time to train one"
    return Tokens(f"pixels:{factor}", pixels, False, reconstruct(pixels, images, device), why)


def new_sizes(side: int) -> dict[str, Any]:
    """Of a tokenizer that is trained from the start: as the bundled ones for photographs and for small pictures."""
    if side >= _LARGE:
        return {"channels": 16, "factor": 16, "widths": (128, 192, 256), "depth": 2, "patch": 4}
    return {"channels": 8, "factor": 4, "widths": (32, 64, 128), "depth": 2, "patch": 1}


def token_patch(side: int) -> int:
    """Side of the squares of latent positions that become one token: at most 256 tokens, where that divides."""
    for patch in (1, 2, 4):
        if side % (2 * patch) == 0 and (side // patch) ** 2 <= _MOST_TOKENS:
            return patch
    return 1


def _numbers(tokenizer: Tokenizer, side: int) -> int:
    """Of a latent."""
    return tokenizer.channels * (side // tokenizer.factor) ** 2


def _candidates() -> list[str]:
    return bundled_tokenizers() + bundled_models()


def _try(name: str, images: Tensor, device: str) -> tuple[Tokenizer, Reconstruction] | None:
    """None where it does not fit: by the side, by the size of the latent, or because it knows no colours."""
    tokenizer, side = load_tokenizer(name), images.shape[-1]
    if side % (2 * tokenizer.factor) or not _LEAST_SIDE <= side // tokenizer.factor <= _MOST_SIDE:
        return None
    try:
        return tokenizer, reconstruct(tokenizer, images, device)
    except ValueError:
        return None


def _decibels(measured: Reconstruction, count: int) -> str:
    quality = "nothing is lost" if math.isinf(measured.psnr) else f"{measured.psnr:.1f} dB"
    return f"{quality} on {count} held-out pictures"
