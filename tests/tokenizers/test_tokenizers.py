"""Tokenizers: round trips, unit scale, refusal; diffusers' classes small and random."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ecar.files.tensors import load_weights
from ecar.pretrained.folders import BUNDLED
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, Tokenizer, load_tokenizer


def diffusers_autoencoder(name: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        )  # fmt: skip
    if name == "AutoencoderDC":
        return diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
            scaling_factor=0.5,
        )  # fmt: skip
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
    }  # fmt: skip
    if name == "AutoencoderKLFlux2":
        return diffusers.AutoencoderKLFlux2(**blocks)
    return diffusers.AutoencoderKL(**blocks, scaling_factor=0.25, shift_factor=0.1)


@pytest.mark.parametrize("kind", sorted(Tokenizer.kinds))
def test_every_tokenizer_gives_unit_scale_and_comes_back_from_its_folder(kind: str, tmp_path: Path) -> None:
    """A new one is found by its kind: a file in the folder of tokenizers is all that it takes."""
    torch.manual_seed(0)
    made = Tokenizer.kinds[kind]
    tokenizer = made(diffusers_autoencoder("AutoencoderTiny")) if kind == "diffusers" else made()  # type: ignore[call-arg]
    images = torch.rand(4, 3, 32, 64) * 2 - 1
    tokenizer.measure([tokenizer.encode_raw(images)])
    z = tokenizer.encode(images)
    assert z.shape == (4, tokenizer.channels, *tokenizer.latent_side(32, 64)) and abs(float(z.std()) - 1) < 0.05
    assert tokenizer.decode(z).shape == images.shape
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is made and again.fingerprint() == tokenizer.fingerprint()


DIFFUSERS = ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2"]


def test_pixels_are_exact_in_both_directions_and_positions_are_kept() -> None:
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    tokenizer = PixelTokenizer(factor=4)
    z = tokenizer.encode(x)
    assert z.shape == (2, 48, 2, 3) and torch.equal(tokenizer.decode(z), x)
    assert torch.equal(z[0, :, 1, 2].view(3, 4, 4), x[0, :, 4:8, 8:12])


@pytest.mark.parametrize("image_channels", [1, 3])
def test_conv_shapes_at_any_side_that_divides_and_small_latents_decode(image_channels: int) -> None:
    tokenizer = ConvTokenizer(image_channels=image_channels, widths=(4, 8, 8), depth=1)
    z = tokenizer.encode(torch.rand(2, 3, 16, 24))
    assert z.shape == (2, 4, 4, 6) and tokenizer.decode(z).shape == (2, 3, 16, 24)
    assert tokenizer.decode(torch.nn.functional.avg_pool2d(z, 2)).shape == (2, 3, 8, 12)


def test_a_tokenizer_of_patches_keeps_its_shapes_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(channels=5, factor=16, patch=4, widths=(8, 12, 16), depth=1)
    z = tokenizer.encode(torch.rand(2, 3, 32, 64))
    assert z.shape == (2, 5, 2, 4) and tokenizer.decode(z).shape == (2, 3, 32, 64)
    assert tokenizer.decode(torch.nn.functional.avg_pool2d(z, 2)).shape == (2, 3, 16, 32)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint() and torch.equal(again.decode(z), tokenizer.decode(z))


def test_the_bundled_tokenizer_keeps_real_photographs_and_its_pooled_latents_decode() -> None:
    """scikit-learn's two photographs, of which it saw none; pooled latents are what coarse stages draw."""
    sample_images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    crops = [torch.from_numpy(image[60:316, 200:456].copy()) for image in sample_images]
    x = torch.stack(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokenizer = load_tokenizer("photographs").eval()
    z = tokenizer.encode(x)
    assert z.shape == (2, 16, 16, 16) and 0.6 < float(z.std()) < 1.6
    for latents, pictures, least in ((z, x, 19.0), (pooled(z), pooled(x), 16.0)):
        error = (tokenizer.decode(latents) - pictures).square().mean((1, 2, 3))
        assert float((10 * torch.log10(4 / error)).min()) > least


def pooled(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x, 2)


def test_measured_latents_have_unit_scale() -> None:
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(widths=(4, 8, 8), depth=1)
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    tokenizer.measure([tokenizer.encode_raw(part) for part in images.split(16)])
    z = tokenizer.encode(images)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_autoencoders_round_trip_through_a_folder(name: str, tmp_path: Path) -> None:
    """Loaded from diffusers' own folder, then from ours with measured statistics: the same latents."""
    diffusers_autoencoder(name).save_pretrained(tmp_path / "theirs")
    tokenizer = load_tokenizer(tmp_path / "theirs")
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    raw = tokenizer.encode_raw(images)
    tokenizer.measure([raw])
    tokenizer.save(tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    z = again.encode(images)
    assert torch.equal(z, tokenizer.encode(images)) and again.fingerprint() == tokenizer.fingerprint()
    assert z.shape == (2, tokenizer.channels, 32 // tokenizer.factor, 48 // tokenizer.factor)
    assert again.decode(z).shape == images.shape


def test_published_scale_and_shift_are_the_first_statistics() -> None:
    from ecar.tokenizers.diffusers import DiffusersTokenizer

    autoencoder = diffusers_autoencoder("AutoencoderKL")
    tokenizer = DiffusersTokenizer(autoencoder)
    images = torch.rand(1, 3, 16, 16)
    published = (autoencoder.encode(images).latent_dist.mode() - 0.1) * 0.25
    assert torch.allclose(tokenizer.encode(images), published, atol=1e-5)


def test_a_tiny_decoder_gets_the_published_scaled_latent_not_the_measured_one(tmp_path: Path) -> None:
    """The model's unit scale is measured on data; TAESD reads (raw - shift) * scaling as published."""
    from ecar.tokenizers.diffusers import DiffusersTokenizer, tiny_decoder

    diffusers_autoencoder("AutoencoderTiny").save_pretrained(tmp_path / "tiny")
    tokenizer = DiffusersTokenizer(diffusers_autoencoder("AutoencoderKL"))
    raw = torch.randn(2, 4, 8, 8) * 3 + 1
    tokenizer.measure([raw])
    tiny = tiny_decoder(tmp_path / "tiny", tokenizer)
    with torch.no_grad():
        expected = diffusers_autoencoder("AutoencoderTiny").decode((raw - 0.1) * 0.25).sample.clamp(-1, 1)
    assert torch.allclose(tiny.decode(tokenizer.normalize(raw)), expected, atol=1e-5)
    assert not torch.allclose(expected, tokenizer.decode(tokenizer.normalize(raw)), atol=1e-2)


def test_a_decoder_of_other_latents_is_refused(tmp_path: Path) -> None:
    from ecar.tokenizers.diffusers import DiffusersTokenizer, tiny_decoder

    diffusers = pytest.importorskip("diffusers")
    tokenizer = DiffusersTokenizer(diffusers_autoencoder("AutoencoderKL"))
    diffusers_autoencoder("AutoencoderTiny").save_pretrained(tmp_path / "tiny")
    diffusers_autoencoder("AutoencoderKL").save_pretrained(tmp_path / "kl")
    sizes = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    diffusers.AutoencoderTiny(**sizes, **blocks, latent_channels=4).save_pretrained(tmp_path / "factor4")
    with pytest.raises(ValueError, match="these are of pixels"):
        tiny_decoder(tmp_path / "tiny", PixelTokenizer(factor=4))
    with pytest.raises(ValueError, match="is a AutoencoderKL, not an AutoencoderTiny"):
        tiny_decoder(tmp_path / "kl", tokenizer)
    with pytest.raises(ValueError, match=r"reads \(4, 4\) .* the model's latents are \(4, 2\)"):
        tiny_decoder(tmp_path / "factor4", tokenizer)
    with pytest.raises(ValueError, match="cannot be loaded"):
        tiny_decoder(tmp_path / "nothing", tokenizer)


def test_fingerprint_tells_weights_and_statistics_apart() -> None:
    torch.manual_seed(0)
    a = ConvTokenizer(widths=(4, 8, 8), depth=1)
    before = a.fingerprint()
    assert before == a.fingerprint() != ConvTokenizer(widths=(4, 8, 8), depth=1).fingerprint()
    a.mean += 1
    assert a.fingerprint() != before


def test_changed_weights_behind_an_old_description_are_refused(tmp_path: Path) -> None:
    tokenizer = ConvTokenizer(widths=(4, 8, 8), depth=1)
    tokenizer.save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    tokenizer.mean += 1
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="fingerprint"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["pixels:x", "no-such-folder", "./missing/folder"])
def test_unknown_tokenizers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(name)


def test_missing_weights_name_the_command_that_converts_the_pickle_of_their_name(tmp_path: Path) -> None:
    """The hint named whatever pickle came first, and another target."""
    for name in ("decoder.pth", "encoder.pth"):
        (tmp_path / name).write_bytes(b"x")
    target = tmp_path / "encoder.safetensors"
    words = f"torch.load('{tmp_path / 'encoder.pth'}', weights_only=True), '{target}')"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_weights(torch.nn.Linear(1, 1), target)


def test_a_model_folder_given_as_tokenizer_names_the_tokenizer_in_it() -> None:
    """It was taken for a diffusers autoencoder, and '_class_name' was all that was said."""
    with pytest.raises(ValueError, match=r"a model; its tokenizer is .*fashion/tokenizer"):
        load_tokenizer(BUNDLED / "fashion")


def test_wrong_images_are_refused() -> None:
    tokenizer: Tokenizer = PixelTokenizer(factor=4)
    with pytest.raises(ValueError, match="does not divide"):
        tokenizer.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match="shape"):
        tokenizer.encode(torch.zeros(1, 1, 8, 8))


def test_a_subclass_of_the_same_kind_is_not_what_folders_of_it_load(tmp_path: Path) -> None:
    """One that inverted pixels took the place of its parent for every folder that was read afterwards."""

    class Inverted(PixelTokenizer):
        def decode_raw(self, z: torch.Tensor) -> torch.Tensor:
            return -super().decode_raw(z)

    PixelTokenizer(factor=1).save(tmp_path)
    assert type(load_tokenizer(tmp_path)) is PixelTokenizer and Inverted.kind == "pixels"
