"""A small convolutional autoencoder that the project trains itself (``ecar tokenizer``).

Fully convolutional and free of global statistics, so that it decodes a pooled latent as readily as a full one. Its
training asks for just that (scale consistency, see ``ecar.training.tokenizer``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ecar.tokenizers.base import Tokenizer


class ChannelRMSNorm(nn.Module):
    """RMSNorm over channels at each position: (B, C, h, w) -> same. No statistics across positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6).to(x.dtype)
        return x * scale * self.weight.view(1, -1, 1, 1).to(x.dtype)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (B, C, h, w) -> same. Starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelRMSNorm(channels), ChannelRMSNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Upsample(nn.Module):
    """Bilinear 2x, then a convolution: (B, C, h, w) -> (B, D, 2h, 2w). Nearest neighbour leaves a faint weave."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False))


class Refine(nn.Module):
    """x + a small convolution network of x, at full size: hides the seams that pixel shuffle leaves between patches."""

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class ConvTokenizer(Tokenizer):
    """Encoder and decoder of ``log2(factor / patch)`` levels.

    Args:
        channels: latent channels.
        factor: pixels per latent position, a power of two.
        image_channels: 3, or 1 for grey data (encode averages the colours, decode repeats the one channel).
        widths: channels of each level from the image side inwards, ``log2(factor / patch) + 1`` of them.
        depth: residual blocks per level in the decoder; the encoder has one.
        patch: side of the squares of pixels that the first convolution reads and the last one writes at once, a power
            of two; 4 for photographs of 256 pixels, where convolutions at full size would cost most. 1: the decoder
            works at full size (and the encoder at half).
    """

    kind = "conv"

    def __init__(
        self,
        *,
        channels: int = 4,
        factor: int = 4,
        image_channels: int = 3,
        widths: tuple[int, ...] = (32, 64, 128),
        depth: int = 2,
        patch: int = 1,
    ) -> None:
        for name, value, least in (("factor", factor, 2), ("patch", patch, 1)):
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {value}")
        levels = (factor // patch).bit_length() - 1
        if levels < 1:
            raise ValueError(f"patch must be smaller than factor, got patch {patch} and factor {factor}")
        if len(widths) != levels + 1:
            raise ValueError(
                f"widths needs {levels + 1} entries for factor {factor} and patch {patch}, got {len(widths)}: {widths}"
            )
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 or 3, got {image_channels}")
        super().__init__(channels=channels, factor=factor)
        self.image_channels, self.widths, self.depth, self.patch = image_channels, tuple(widths), depth, patch
        # The encoder's costliest resolution is skipped: squares of at least 2 x 2 pixels go into channels first.
        self.folded = max(2, patch)
        self.encoder = nn.Sequential(*self._encoder_layers())
        self.decoder = nn.Sequential(*self._decoder_layers())

    def _encoder_layers(self) -> Iterator[nn.Module]:
        first = 1 if self.patch == 1 else 0  # the first level is at full size
        yield nn.Conv2d(self.folded**2 * self.image_channels, self.widths[first], 3, padding=1)
        for level in range(first, len(self.widths)):
            if level > first:
                yield nn.Conv2d(self.widths[level - 1], self.widths[level], 4, stride=2, padding=1)
            yield ResBlock(self.widths[level])
        yield from (ChannelRMSNorm(self.widths[-1]), nn.SiLU())
        yield nn.Conv2d(self.widths[-1], self.channels, 3, padding=1)

    def _decoder_layers(self) -> Iterator[nn.Module]:
        yield nn.Conv2d(self.channels, self.widths[-1], 3, padding=1)
        for level in range(len(self.widths) - 1, -1, -1):
            width = self.widths[level]
            yield from (ResBlock(width) for _ in range(1 if self.patch == 1 and level == 0 else self.depth))
            if level and self.patch == 1:
                yield Upsample(width, self.widths[level - 1])
            elif level:
                yield from (nn.Conv2d(width, 4 * self.widths[level - 1], 1), nn.PixelShuffle(2))
        yield from (ChannelRMSNorm(self.widths[0]), nn.SiLU())
        yield nn.Conv2d(self.widths[0], self.patch**2 * self.image_channels, 3, padding=1)
        if self.patch > 1:
            yield from (nn.PixelShuffle(self.patch), Refine(self.image_channels))

    def config(self) -> dict[str, Any]:
        """Arguments that build the same network again, as JSON."""
        return {
            "channels": self.channels,
            "factor": self.factor,
            "image_channels": self.image_channels,
            "widths": list(self.widths),
            "depth": self.depth,
            **({"patch": self.patch} if self.patch > 1 else {}),
        }

    def check_images(self, images: Tensor) -> None:
        if self.image_channels == 1 and not bool((images == images[:, :1]).all()):
            raise ValueError(
                'the images are coloured, and the tokenizer is for grey ones (as that of "fashion"): '
                "take another, or make the images grey"
            )

    def encode_raw(self, images: Tensor) -> Tensor:
        if self.image_channels == 1:
            images = images.mean(1, keepdim=True)
        images = rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=self.folded, q=self.folded)
        return self.encoder(images)

    def decode_raw(self, latents: Tensor) -> Tensor:
        images = self.decoder(latents)
        return images.expand(-1, 3, -1, -1) if self.image_channels == 1 else images
