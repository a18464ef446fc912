"""The loss of ``ecar tokenizer``, on images x with latents z (unit scale by running statistics):

    reconstruction      |dec(z + noise) - x|          L1 + squared error
    perceptual          EfficientNet-Lite0 features of the first strides, channel-normalised as in LPIPS (1801.03924)
    scale consistency   the same two between dec(D z + noise) and D x, for 2x2 pooling D and its powers
                        (EQ-VAE 2502.09509, 2502.14831): every coarse stage of ECAR lives on pooled latents
    adversarial         off unless asked for: what a network that tells dec(z + noise) from x makes of it (VQGAN)

The noise keeps neighbouring latents decodable, so that small errors of the sampler stay small in the image.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.evaluation.features import EfficientNetLite
from ecar.tokenizers.conv import ConvTokenizer
from ecar.training.adversary import Adversary
from ecar.training.tokenizer_config import TokenizerConfig

Network = TypeVar("Network", bound=nn.Module)
_PERCEPTUAL_BLOCKS = (0, 2, 4)  # EfficientNet-Lite0 blocks at strides 2, 4 and 8


class TokenizerLoss(nn.Module):
    """The loss above as a function of (images, noise)."""

    def __init__(self, tokenizer: ConvTokenizer, config: TokenizerConfig) -> None:
        super().__init__()
        self.tokenizer, self.config, run = tokenizer, config.loss, config.run
        self.features = channels_last(EfficientNetLite(), run.device) if self.config.perceptual else None
        weight = self.config.adversarial
        self.adversary = Adversary(weight, run.device, run.seed) if weight else None
        self.decoded: Tensor | None = None
        self.encode, self.decode = tokenizer.encode_raw, tokenizer.decode_raw
        if run.compile:
            self.encode = torch.compile(self.encode, dynamic=False)
            self.decode = torch.compile(self.decode, dynamic=False)

    def forward(self, images: Tensor, noise: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Images (B, 3, H, W) in [-1, 1], one noise map per level -> named terms (unweighted), raw latents."""
        tok, cfg = self.tokenizer, self.config
        raw = self.encode(images)
        latents = tok.normalize(raw)
        terms: dict[str, Tensor] = {}
        levels = range(1 + (cfg.scale_levels if cfg.scale_consistency else 0))
        for level in levels:
            if level:
                latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
            decoded = self.decode(tok.denormalize(latents + cfg.latent_noise * noise[level])).float()
            if self.adversary is not None and not level:
                self.adversary.oppose(decoded)
                self.decoded = decoded
            error = decoded - images
            terms[f"reconstruction_{level}"] = error.abs().mean() + error.square().mean()
            if self.features is not None:
                terms[f"perceptual_{level}"] = self.perceptual(decoded, images)
        return terms, raw

    def perceptual(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Mean squared distance of channel-normalised features."""
        assert self.features is not None
        maps = []
        for picture in (decoded, images.detach()):
            layers = self.features.layers(picture, _PERCEPTUAL_BLOCKS[-1])
            maps.append([F.normalize(layers[1 + b].float(), dim=1) for b in _PERCEPTUAL_BLOCKS])
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(*maps, strict=True)]).mean()

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        cfg = self.config
        weights = {name: 1.0 if name.endswith("_0") else cfg.scale_consistency for name in terms}
        factors = {name: cfg.perceptual if name.startswith("perceptual") else 1.0 for name in terms}
        return torch.stack([weights[n] * factors[n] * t for n, t in terms.items()]).sum()


def channels_last(module: Network, device: str) -> Network:
    """Move ``module`` in place; convolutions on CPU run faster with channels last."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module
