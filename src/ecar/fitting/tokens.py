"""Which tokenizer: measured on held-out pictures, since every later picture goes through it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ecar.evaluation.extractors import Extractor
from ecar.fitting.measure import Reconstruction, difference, reconstruct
from ecar.fitting.options import NEW
from ecar.pretrained.folders import bundled_models
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, Tokenizer, bundled_tokenizers, load_tokenizer, same_latents

GOOD = 21.0  # dB: below, a tokenizer is trained where there is time
POOR = 17.0  # dB: below, pixels themselves are better latents
_LEAST_SIDE, _MOST_SIDE = 8, 32  # of a latent
_MOST_TOKENS = 256
_LARGE = 128  # pixels
_COMPARED = 8  # pictures that decoders of the same latents are compared on
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


def choose_tokenizer(
    name: str | None, images: Tensor, seconds: float, device: str, extractor: Extractor | None
) -> Tokens:
    """Of the bundled tokenizers that give ``images`` (N, 3, H, W) uint8 back well, the one with the smallest latent.

    Where none does: of all of them, trained further, if there is time; else the best one, or pixels if it is poor.

    Args:
        name: the user's choice, if any.
        images: held-out pictures.
        seconds: for everything.
        device: where pictures are encoded.
        extractor: judges decoders of the same latents.

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
    found = _encoders(images, device)
    if found:
        psnr = {name: one[1].psnr for name, one in found.items()}
        good = [name for name in found if psnr[name] >= GOOD]
        if good or seconds >= _TIME:
            best = min(good or found, key=lambda name: (_numbers(found[name][0], side), -psnr[name]))
        else:
            best = max(found, key=lambda name: psnr[name])
        chosen, tokenizer, measured, decoders = _decoder(best, *found[best], images, device, extractor)
        others = [decoders, *(f"{name} {psnr[name]:.1f} dB" for name in found if name != best)]
        words = "; ".join([_decibels(measured, len(images)), *filter(None, others)])
        if psnr[best] >= GOOD:
            return Tokens(chosen, tokenizer, False, measured, words)
        if seconds >= _TIME:
            return Tokens(
                chosen, tokenizer, True, measured, f"{words}; less than {GOOD:g} dB, so it is trained further"
            )
        if psnr[best] >= POOR:
            return Tokens(chosen, tokenizer, False, measured, f"{words}; too little time to train a better one")
    factor = next((f for f in (1, 2, 4, 8, 16) if side % (2 * f) == 0 and (side // f) ** 2 <= _MOST_TOKENS), 0)
    if not factor:
        raise ValueError(f"--resolution {side} fits no tokenizer; choose a multiple of 32")
    pixels = PixelTokenizer(factor=factor)
    why = "no other fits this side well, and there is too little time to train one"
    return Tokens(f"pixels:{factor}", pixels, False, reconstruct(pixels, images, device), why)


def _encoders(images: Tensor, device: str) -> dict[str, tuple[Tokenizer, Reconstruction]]:
    """Bundled tokenizers that fit, one for each kind of latents."""
    found: dict[str, tuple[Tokenizer, Reconstruction]] = {}
    for name in _candidates():
        tokenizer = load_tokenizer(name)
        if not any(same_encoder(tokenizer, other) for other, _ in found.values()):
            measured = _try(tokenizer, images, device)
            found |= {name: (tokenizer, measured)} if measured is not None else {}
    return found


def _decoder(
    name: str, tokenizer: Tokenizer, measured: Reconstruction, images: Tensor, device: str, extractor: Extractor | None
) -> tuple[str, Tokenizer, Reconstruction, str]:
    """Of the bundled decoders of these latents the one whose pictures are most like the real ones in features: the
    sharp ones lose decibels. The first one where nothing can judge. In words too."""
    known, some = {name: (tokenizer, measured)}, images[:_COMPARED]
    for other in _candidates() if extractor is not None else ():
        if other != name and same_encoder(one := load_tokenizer(other), tokenizer):
            known[other] = one, replace(reconstruct(one, some, device), latents=measured.latents)
    if extractor is None or len(known) == 1:
        return name, tokenizer, measured, ""
    away = {other: difference(extractor, some, one[1].images[:_COMPARED]) for other, one in known.items()}
    best = min(away, key=lambda other: away[other])
    others = ", ".join(f"{other} {away[other]:.3g}, {known[other][1].psnr:.1f} dB" for other in known if other != best)
    return best, *known[best], f"features differ by {away[best]:.3g} (other decoders of its latents: {others})"


def same_encoder(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether a model of the latents of one draws for the decoder of the other."""
    if isinstance(one, ConvTokenizer) and isinstance(other, ConvTokenizer):
        return same_latents(one, other)
    return one.fingerprint() == other.fingerprint()


def new_sizes(side: int) -> dict[str, Any]:
    """Of a tokenizer that is trained from the start: as the bundled ones for photographs and for small pictures."""
    if side >= _LARGE:
        return {"channels": 16, "factor": 16, "widths": (128, 192, 256), "depth": 2, "patch": 4}
    return {"channels": 8, "factor": 4, "widths": (32, 64, 128), "depth": 2, "patch": 1}


def token_patch(side: int, most: int = _MOST_TOKENS) -> int:
    """Side of the squares of latent positions that become one token: at most ``most`` tokens, where that divides."""
    for patch in (1, 2, 4):
        if side % (2 * patch) == 0 and (side // patch) ** 2 <= most:
            return patch
    return 1


def _numbers(tokenizer: Tokenizer, side: int) -> int:
    """Of a latent."""
    return tokenizer.channels * (side // tokenizer.factor) ** 2


def _candidates() -> list[str]:
    return bundled_tokenizers() + bundled_models()


def _try(tokenizer: Tokenizer, images: Tensor, device: str) -> Reconstruction | None:
    """None where it does not fit: by the side, by the size of the latent, or because it knows no colours."""
    side = images.shape[-1]
    if side % (2 * tokenizer.factor) or not _LEAST_SIDE <= side // tokenizer.factor <= _MOST_SIDE:
        return None
    try:
        return reconstruct(tokenizer, images, device)
    except ValueError:
        return None


def _decibels(measured: Reconstruction, count: int) -> str:
    quality = "nothing is lost" if math.isinf(measured.psnr) else f"{measured.psnr:.1f} dB"
    return f"{quality} on {count} held-out pictures"
