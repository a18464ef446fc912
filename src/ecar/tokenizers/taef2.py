"""TAEF2, the tiny autoencoder of FLUX.2's latents (github.com/madebyollin/taesd, MIT licence): 2.7 M parameters for
photographs of any size. diffusers has no class for it; this one is written after its weights.

A latent position stands for 16 x 16 pixels, as FLUX.2's transformer reads them: 2 x 2 positions of 32 channels are one
of 128.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ecar.files.tensors import load_weights
from ecar.tokenizers.base import Tokenizer

_WIDTH, _CHANNELS, _GROUPS = 64, 32, 4
FILES = ("taef2_encoder.safetensors", "taef2_decoder.safetensors")


class _Block(nn.Module):
    """relu(x + three convolutions of x); where maps are smallest, a channel mixer with statistics of the whole map
    before it: (B, 64, h, w) -> same."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        wide = 4 * _WIDTH
        mixer = (nn.Conv2d(_WIDTH, wide, 1, bias=False), nn.GroupNorm(_GROUPS, wide), nn.ReLU())
        self.pool = nn.Sequential(*mixer, nn.Conv2d(wide, _WIDTH, 1, bias=False)) if mixes else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


class _Clamp(nn.Module):
    """3 tanh(x / 3): latents beyond what the encoder gives."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def _conv(before: int = _WIDTH, after: int = _WIDTH, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=bias)


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3), _Block()]
    for level in range(3):
        layers += [_conv(stride=2, bias=False), *(_Block(mixes=level == 2) for _ in range(3))]
    return nn.Sequential(*layers, _conv(_WIDTH, _CHANNELS))


def _decoder() -> nn.Sequential:
    layers: list[nn.Module] = [_Clamp(), _conv(_CHANNELS), nn.ReLU()]
    for level in range(3):
        blocks = (_Block(mixes=level == 0) for _ in range(3))
        layers += [*blocks, nn.Upsample(scale_factor=2), _conv(bias=False)]
    return nn.Sequential(*layers, _Block(), _conv(_WIDTH, 3))


class Taef2Tokenizer(Tokenizer):
    """128 channels, 16 pixels per position. ``mean`` and ``std`` start as 0 and 1; ``ecar encode`` and ``ecar train``
    measure them."""

    kind = "taef2"
    license = "mit"

    def __init__(self) -> None:
        super().__init__(channels=4 * _CHANNELS, factor=16)
        self.encoder, self.decoder = _encoder(), _decoder()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder with ``FILES``, the published weights as safetensors.

        Raises:
            ValueError: a file is missing (the message says how to convert a pickle), damaged or of another model.
        """
        tokenizer = cls()
        for part, name in zip((tokenizer.encoder, tokenizer.decoder), FILES, strict=True):
            load_weights(part, folder / name)
        return tokenizer

    def config(self) -> dict[str, Any]:
        return {}

    def encode_raw(self, images: Tensor) -> Tensor:
        latents = self.encoder(images / 2 + 0.5)
        return rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)

    def decode_raw(self, latents: Tensor) -> Tensor:
        latents = rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
        images: Tensor = 2 * self.decoder(latents) - 1
        return images
