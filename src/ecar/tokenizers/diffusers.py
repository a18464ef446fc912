"""Autoencoders of the diffusers library behind the tokenizer protocol.

The latent statistics of the published configuration (scaling and shift factors, FLUX.2's batch norm) are the
starting value of ``mean`` and ``std``; ``ecar encode`` and ``ecar train`` replace them by measured ones.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from ecar.files.access import check_readable, usual_mode
from ecar.files.remote import hub_reason
from ecar.files.tensors import load_weights, write_tensors
from ecar.tokenizers.base import Tokenizer

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2")
_GAUSSIAN = ("AutoencoderKL", "AutoencoderKLFlux2")


class DiffusersTokenizer(Tokenizer):
    """Wraps an autoencoder object. ``encode`` gives the mode of the posterior; ``encode_moments`` all of it.

    Args:
        autoencoder: an instance of one of ``CLASSES``.
    """

    kind = "diffusers"

    def __init__(self, autoencoder: Any) -> None:
        self.class_name = type(autoencoder).__name__
        if self.class_name not in CLASSES:
            raise ValueError(f"unsupported autoencoder {self.class_name}; supported: {', '.join(CLASSES)}")
        probe_side = 128
        with torch.no_grad():  # the classes name their factors differently: look at what comes out
            probe = _encode(autoencoder.eval(), torch.zeros(1, 3, probe_side, probe_side), self.class_name)
        super().__init__(channels=probe.shape[1], factor=probe_side // probe.shape[-1])
        self.has_moments = self.class_name in _GAUSSIAN
        self.autoencoder = autoencoder.requires_grad_(False)
        mean, std = _published_statistics(autoencoder, self.channels)
        self.mean.copy_(mean)
        self.std.copy_(std)

    @classmethod
    def load(cls, source: str, *, class_name: str | None = None, revision: str | None = None) -> Self:
        """From a folder or a Hub id, safetensors only; ValueError says what is missing."""
        for path in (Path(source), *Path(source).glob("*")):
            check_readable(path)
        try:
            import diffusers
        except ImportError as error:
            raise ValueError('diffusers autoencoders need: pip install "ecar[diffusers]"') from error
        try:
            with warnings.catch_warnings():  # of diffusers, about its own calls
                warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
                if class_name is None:
                    class_name = diffusers.AutoencoderKL.load_config(source, revision=revision)["_class_name"]
                if class_name not in CLASSES:
                    raise ValueError(f"unsupported autoencoder {class_name}; supported: {', '.join(CLASSES)}")
                autoencoder, loaded = getattr(diffusers, class_name).from_pretrained(
                    source, revision=revision, use_safetensors=True, output_loading_info=True
                )
        except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
            reason = hub_reason(error)
            raise ValueError(f"tokenizer {source!r}: cannot be loaded as a diffusers autoencoder: {reason}") from error
        if missing := sorted(loaded["missing_keys"]):  # diffusers only warns, and leaves them random or empty
            raise ValueError(f"tokenizer {source!r}: {len(missing)} weights are missing (such as {missing[0]})")
        return cls(autoencoder)

    def config(self) -> dict[str, Any]:
        return {"class_name": self.class_name}

    def encode_raw(self, images: Tensor) -> Tensor:
        return _encode(self.autoencoder, images.to(self.autoencoder.dtype), self.class_name)

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.has_moments:
            return self.encode_raw(images), None
        posterior = self.autoencoder.encode(images.to(self.autoencoder.dtype)).latent_dist
        return _patch(posterior.mean, self.class_name), _patch(posterior.logvar, self.class_name)

    def decode_raw(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.autoencoder.dtype)
        if self.class_name == "AutoencoderKLFlux2":
            latents = rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
        decoded: Tensor = self.autoencoder.decode(latents, return_dict=False)[0]
        return decoded

    def statistics(self) -> nn.Module:
        """``mean`` and ``std`` by themselves, with the same storage: the state that is not the autoencoder's own."""
        own = nn.Module()
        own.register_buffer("mean", self.mean)
        own.register_buffer("std", self.std)
        return own

    @classmethod
    def restore(cls, folder: Path, config: dict[str, Any]) -> Self:
        """As ``Tokenizer.restore``, with the autoencoder under ``autoencoder/``."""
        tokenizer = cls.load(str(folder / "autoencoder"), class_name=config["class_name"])
        load_weights(tokenizer.statistics(), folder / "tokenizer.safetensors")
        return tokenizer

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:  # noqa: ARG002
        """As ``Tokenizer.save``, with the autoencoder in diffusers' own layout and type under ``autoencoder/``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder.save_pretrained(folder / "autoencoder")
        for weights in (folder / "autoencoder").glob("*.safetensors"):
            usual_mode(weights)
        write_tensors(folder / "tokenizer.safetensors", self.statistics().state_dict(), self.about())
        record = {"kind": self.kind, **self.config(), "fingerprint": self.fingerprint()}
        (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def tiny_decoder(source: str | Path, tokenizer: Tokenizer) -> DiffusersTokenizer:
    """A small decoder for the latents of ``tokenizer``, such as TAESD for Stable Diffusion's: many times cheaper, a
    little less sharp. Its ``decode`` takes the same unit-scale latents.

    Args:
        source: folder or Hub id of an AutoencoderTiny that was trained for the latents of this autoencoder.
        tokenizer: of the model; an AutoencoderKL.

    Raises:
        ValueError: it cannot be loaded, is of another class, or its latents have other channels or another factor.
    """
    if not isinstance(tokenizer, DiffusersTokenizer) or tokenizer.class_name != "AutoencoderKL":
        kind = getattr(tokenizer, "class_name", tokenizer.kind)
        raise ValueError(f"decoder {str(source)!r}: only an AutoencoderKL's latents have one, and these are of {kind}")
    tiny = DiffusersTokenizer.load(str(source))
    if tiny.class_name != "AutoencoderTiny":
        raise ValueError(f"decoder {str(source)!r}: is a {tiny.class_name}, not an AutoencoderTiny")
    ours, theirs = (tokenizer.channels, tokenizer.factor), (tiny.channels, tiny.factor)
    if ours != theirs:
        raise ValueError(f"decoder {str(source)!r}: reads {theirs} (channels, factor), the model's latents are {ours}")
    # It reads its parent's scaled latents, (raw - shift) * scaling; ours are (raw - mean) / std.
    shift, width = _published_statistics(tokenizer.autoencoder, tokenizer.channels)
    tiny.mean.copy_((tokenizer.mean - shift.to(tokenizer.mean)) / width.to(tokenizer.mean))
    tiny.std.copy_(tokenizer.std / width.to(tokenizer.std))
    return tiny


def _encode(autoencoder: Any, images: Tensor, class_name: str) -> Tensor:
    result = autoencoder.encode(images)
    if class_name == "AutoencoderTiny":
        latents: Tensor = result.latents
    elif class_name == "AutoencoderDC":
        latents = result.latent
    else:
        latents = result.latent_dist.mode()
    return _patch(latents, class_name)


def _patch(latents: Tensor, class_name: str) -> Tensor:
    """FLUX.2 models read 2x2 positions as one; other classes: unchanged."""
    if class_name == "AutoencoderKLFlux2":
        return rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    return latents


def _published_statistics(autoencoder: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation from the configuration: scaled latent = (raw - shift) * scaling."""
    norm = getattr(autoencoder, "bn", None)
    if norm is not None and norm.running_mean is not None and len(norm.running_mean) == channels:
        return norm.running_mean, torch.sqrt(norm.running_var + norm.eps)
    config = autoencoder.config
    if type(autoencoder).__name__ == "AutoencoderTiny":  # reads and writes its parent's scaled latent
        return torch.zeros(channels), torch.ones(channels)
    shift = getattr(config, "shift_factor", None) or 0.0
    scaling = getattr(config, "scaling_factor", None) or 1.0
    return torch.full((channels,), float(shift)), torch.full((channels,), 1.0 / float(scaling))
