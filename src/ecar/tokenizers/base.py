"""The tokenizer protocol: images <-> unit-scale latent maps.

Spaces: images (B, 3, H, W) in [-1, 1]  =>  raw latents (B, C, h, w)  =>  unit-scale latents (B, C, h, w),
with h = H / factor. Scale and shift live in the tokenizer (per-channel ``mean`` and ``std``), never elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ecar.devices import images_at_once
from ecar.files.tensors import about, load_weights, write_tensors


class Tokenizer(nn.Module):
    """Base class. A pooled latent (half the side, a quarter...) must decode to a smaller image: the previews of the
    stages rely on it. Subclasses implement ``encode_raw``, ``decode_raw``, ``config`` and set ``kind``; those in files
    of this folder are found by ``load_tokenizer``.

    Attributes:
        kinds: every subclass by its ``kind``.
        kind: name of the family.
        channels: C, channels of a latent map.
        factor: image pixels per latent position, along each side.
        measured: whether ``mean`` and ``std`` were measured on data; ``encode_source`` does it where they were not.
        has_moments: whether the encoder gives a distribution: ``encode_moments`` then has a variance.
    """

    kinds: ClassVar[dict[str, type[Tokenizer]]] = {}
    kind: str = ""
    measured: bool = False
    has_moments: bool = False
    mean: Tensor
    std: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):
            Tokenizer.kinds[cls.kind] = cls

    def __init__(self, *, channels: int, factor: int) -> None:
        super().__init__()
        self.channels, self.factor = channels, factor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def encode_raw(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> raw latents (B, C, h, w)."""
        raise TypeError(f"{type(self).__name__} cannot encode {tuple(images.shape)}: encode_raw is missing")

    def check_images(self, images: Tensor) -> None:
        """ValueError where the tokenizer cannot keep what ``images`` (B, 3, H, W) show; asked before a data set is
        encoded with it."""

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) in [-1, 1] -> mean and logarithm of the variance of the raw latents, each (B, C, h, w); no
        variance where the encoder is deterministic."""
        return self.encode_raw(images), None

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> (B, 3, H, W), about [-1, 1]."""
        raise TypeError(f"{type(self).__name__} cannot decode {tuple(latents.shape)}: decode_raw is missing")

    def config(self) -> dict[str, Any]:
        """Constructor arguments: JSON-able, enough to build the same module without its weights."""
        raise TypeError(f"{type(self).__name__} does not define config")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> unit-scale latents (B, C, H / factor, W / factor), float32. Of large
        images a few are computed at a time; so does ``decode``.

        Raises:
            ValueError: a side does not divide by ``factor``, or the shape is not (B, 3, H, W).
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"encode takes images of shape (B, 3, H, W), got {tuple(images.shape)}")
        self.latent_side(images.shape[-2], images.shape[-1])
        parts = images.split(images_at_once(images.shape[-2], images.shape[-1]))
        return self.normalize(torch.cat([self.encode_raw(part).float() for part in parts]))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Unit-scale latents (B, C, h, w) -> images (B, 3, h * factor, w * factor) clamped to [-1, 1], float32."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"decode takes latents of shape (B, {self.channels}, h, w), got {tuple(latents.shape)}")
        parts = latents.split(images_at_once(latents.shape[-2] * self.factor, latents.shape[-1] * self.factor))
        return torch.cat([self.decode_raw(self.denormalize(part)).float().clamp(-1, 1) for part in parts])

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents -> unit-scale latents."""
        return (raw - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Unit-scale latents -> raw latents."""
        return latents * self.std.view(1, -1, 1, 1).to(latents) + self.mean.view(1, -1, 1, 1).to(latents)

    def latent_side(self, height: int, width: int) -> tuple[int, int]:
        """Sides of the latent map of an image of ``height`` x ``width`` pixels; ValueError if they do not divide."""
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"image side {height}x{width} does not divide by the tokenizer's factor {self.factor}; "
                f"choose multiples of {self.factor}"
            )
        return height // self.factor, width // self.factor

    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of kind, configuration and every weight: two tokenizers with the same fingerprint
        give the same latents. A model stores it and refuses latents that carry another."""
        digest = hashlib.sha256(json.dumps([self.kind, self.config()], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def about(self) -> dict[str, str]:
        """Metadata of its weights file."""
        return about(tokenizer=f"{self.kind} {self.fingerprint()}")

    @torch.no_grad()
    def measure(self, raw_batches: Iterable[Tensor]) -> None:
        """Set ``mean`` and ``std`` from raw latents (each (B, C, h, w)), so that ``encode`` returns unit scale. Batches
        are taken one after the other, and none is kept."""
        count, mean, squares = 0, torch.zeros(self.channels).double(), torch.zeros(self.channels).double()
        for batch in raw_batches:
            values = batch.cpu().double().transpose(0, 1).flatten(1)
            more, there = values.shape[1], values.mean(1)
            share = more / (count + more)
            squares += (values - there[:, None]).square().sum(1) + (there - mean).square() * count * share
            mean += (there - mean) * share
            count += more
        self.mean.copy_(mean)
        self.std.copy_((squares / max(1, count - 1)).sqrt().clamp_min(1e-6))
        self.measured = True

    @classmethod
    def restore(cls, folder: Path, config: dict[str, Any]) -> Self:
        """What ``save`` wrote: the constructor's arguments, and ``tokenizer.safetensors`` in ``folder``."""
        try:
            tokenizer = cls(**config)
        except ValueError as error:  # its message names no file
            raise ValueError(f"{folder / 'config.json'}: not the configuration of a tokenizer ({error})") from None
        load_weights(tokenizer, folder / "tokenizer.safetensors")
        return tokenizer

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``tokenizer.safetensors`` into ``folder``; ``dtype`` is that of the stored weights.

        Raises:
            ValueError: the weights are not exact in ``dtype``: what is loaded would be another tokenizer.
        """
        folder = Path(folder)
        weights = {name: t.detach().contiguous().cpu() for name, t in self.state_dict().items()}
        stored = {name: t.to(dtype) for name, t in weights.items()}
        if any(not torch.equal(stored[name].to(t.dtype), t) for name, t in weights.items()):
            raise ValueError(f"the weights are not exact in {dtype}; round them before (module.to({dtype}).float())")
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "tokenizer.safetensors", stored, self.about())
        record = {"kind": self.kind, **self.config(), "fingerprint": self.fingerprint()}
        (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
