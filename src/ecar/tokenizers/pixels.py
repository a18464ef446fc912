"""Pixels as latents: space-to-depth, no weights. For tests, toy data and tiny images."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ecar.tokenizers.base import Tokenizer


class PixelTokenizer(Tokenizer):
    """A latent position holds the ``factor`` x ``factor`` x 3 pixels under it; exact in both directions.

    A pooled latent is not an image of pooled pixels in order, but every offset inside the patch pooled by itself,
    so a coarse latent decodes to a coarse picture all the same.
    """

    kind = "pixels"

    def __init__(self, *, factor: int = 4) -> None:
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        super().__init__(channels=3 * factor * factor, factor=factor)

    def config(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def encode_raw(self, images: Tensor) -> Tensor:
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=self.factor, q=self.factor)

    def decode_raw(self, latents: Tensor) -> Tensor:
        return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=self.factor, q=self.factor)
