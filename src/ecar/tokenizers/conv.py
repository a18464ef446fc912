"""A small convolutional autoencoder that the project trains itself (``ecar tokenizer``).

Fully convolutional and free of global statistics, so that it decodes a pooled latent as readily as a full one. Its
training asks for just that (scale consistency, see ``ecar.training.tokenizer``).
"""

from __future__ import annotations

import math
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


class ConvTokenizer(Tokenizer):
    """Encoder and decoder of ``log2(factor)`` levels.

    Args:
        channels: latent channels.
        factor: pixels per latent position, a power of two.
        image_channels: 3, or 1 for grey data (encode averages the colours, decode repeats the one channel).
        widths: channels of each level from the image side inwards, ``log2(factor) + 1`` of them.
        depth: residual blocks per level in the decoder; the encoder has one.
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
    ) -> None:
        levels = int(math.log2(factor)) if factor > 0 else -1
        if factor < 2 or 2**levels != factor:
            raise ValueError(f"factor must be a power of two of at least 2, got {factor}")
        if len(widths) != levels + 1:
            raise ValueError(f"widths needs {levels + 1} entries for factor {factor}, got {len(widths)}: {widths}")
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 or 3, got {image_channels}")
        super().__init__(channels=channels, factor=factor)
        self.image_channels, self.widths, self.depth = image_channels, tuple(widths), depth
        # Space-to-depth by 2 first: the encoder's costliest resolution is skipped; the decoder works at full size.
        encoder: list[nn.Module] = [nn.Conv2d(4 * image_channels, widths[1], 3, padding=1)]
        for level in range(1, levels + 1):
            if level > 1:
                encoder.append(nn.Conv2d(widths[level - 1], widths[level], 4, stride=2, padding=1))
            encoder.append(ResBlock(widths[level]))
        encoder += [ChannelRMSNorm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], channels, 3, padding=1)]
        decoder: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
        for level in range(levels, -1, -1):
            decoder += [ResBlock(widths[level]) for _ in range(depth if level else 1)]
            if level:
                decoder.append(Upsample(widths[level], widths[level - 1]))
        decoder += [ChannelRMSNorm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], image_channels, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def config(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "factor": self.factor,
            "image_channels": self.image_channels,
            "widths": list(self.widths),
            "depth": self.depth,
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
        images = rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        return self.encoder(images)

    def decode_raw(self, latents: Tensor) -> Tensor:
        images = self.decoder(latents)
        return images.expand(-1, 3, -1, -1) if self.image_channels == 1 else images
