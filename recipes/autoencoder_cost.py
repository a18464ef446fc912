"""What a tokenizer costs: FLOPs and memory of encoding and decoding, counted without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ecar.config import Side
from ecar.cost.flops import flops_of
from ecar.cost.memory import LiveBytes
from ecar.devices import images_at_once
from ecar.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class AutoencoderCost:
    """Of a tokenizer at one side of images.

    Attributes:
        encode_flops, decode_flops: of an image.
        encode_bytes, decode_bytes: weights, and what is alive at the worst moment of a batch.
    """

    encode_flops: int
    decode_flops: int
    encode_bytes: int
    decode_bytes: int


@torch.no_grad()
def autoencoder_cost(tokenizer: Tokenizer, side: Side, batch: int) -> AutoencoderCost:
    """Count on meta tensors, which have shapes and no values.

    Args:
        tokenizer: it is copied; its weights do not matter.
        side: (height, width) of the images in pixels.
        batch: images at a time, for memory; of large ones fewer (``images_at_once``).

    Raises:
        ValueError: a side that does not divide by the tokenizer's factor.
    """
    meta, latent = copy.deepcopy(tokenizer).to("meta"), tokenizer.latent_side(*side)
    weights = sum(p.numel() * p.element_size() for p in meta.parameters())
    count = min(batch, images_at_once(*side))

    def images(number: int) -> torch.Tensor:
        return torch.empty(number, 3, *side, device="meta")

    def latents(number: int) -> torch.Tensor:
        return torch.empty(number, tokenizer.channels, *latent, device="meta")

    return AutoencoderCost(
        encode_flops=flops_of(lambda: meta.encode(images(1))),
        decode_flops=flops_of(lambda: meta.decode(latents(1))),
        encode_bytes=weights + _most(lambda: meta.encode(images(count))),
        decode_bytes=weights + _most(lambda: meta.decode(latents(count))),
    )


def _most(call: Callable[[], object]) -> int:
    """Bytes that were alive at once in a call."""
    with LiveBytes() as live:
        call()
    return live.peak
