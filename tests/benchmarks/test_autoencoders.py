"""What is said of an autoencoder follows from its reconstructions and latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import autoencoders
from ecar.files.tensors import write_tensors
from ecar.tokenizers import PixelTokenizer


class Darker(PixelTokenizer):
    """Loses ten of 255 grey levels."""

    def decode_raw(self, latents: Tensor) -> Tensor:
        return super().decode_raw(latents) - 20 / 255


def test_quality_and_pooled_variance_are_those_of_known_images() -> None:
    images = torch.randint(40, 200, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    record, shown = autoencoders.score(Darker(factor=2), images, 4, 2, lambda one, other: (one - other).mean((1, 2, 3)))
    level = 10 * torch.log10(torch.tensor(255**2 / 10**2)).item()
    assert record["psnr"] == pytest.approx(level, abs=0.1) and shown.shape == images.shape
    assert record["st_lpips"] == pytest.approx(20 / 255, abs=1e-3)
    first, second = record["pooled"]
    assert (first["side"], second["side"]) == (8, 4)
    assert first["variance_kept"] == pytest.approx(1 / 4, abs=0.08)  # of noise, the mean of four keeps a quarter
    assert second["variance_kept"] == pytest.approx(1 / 16, abs=0.05)


def test_files_of_taesd_are_read_into_the_layers_of_diffusers(tmp_path: Path) -> None:
    """Its decoder's layers are numbered from 1, after a clamp without weights."""
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(latent_channels=4)
    parts = (model.encoder.layers, torch.nn.Sequential(torch.nn.Identity(), *model.decoder.layers))
    for part, name in zip(parts, autoencoders.TAESD, strict=True):
        write_tensors(tmp_path / name, {key: value.contiguous() for key, value in part.state_dict().items()})
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    tokenizer = autoencoders.load(str(tmp_path))
    with torch.no_grad():
        expected = model.decode(model.encode(images).latents).sample.clamp(-1, 1)
    assert torch.allclose(tokenizer.decode(tokenizer.encode(images)), expected, atol=1e-5)
