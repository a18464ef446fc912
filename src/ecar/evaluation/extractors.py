"""Feature extractors. An extractor's name is part of a metric's name: only with Inception weights is it FID."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.devices import computes_bfloat16, images_at_once
from ecar.evaluation.features import IMAGENET_MEAN, IMAGENET_STD, EfficientNetLite

DISTANCE_NAMES = {"efficientnet-lite0": "FD-EffNetLite0", "inception": "FID", "dinov2": "FD-DINOv2"}
SPATIAL_FEATURES = 7 * 17 * 17  # of sFID


class Extractor(Protocol):
    """Images (B, 3, H, W) uint8 -> features (B, D) float32, and class probabilities (B, K) where there are classes.

    Attributes:
        name: one of ``DISTANCE_NAMES``.
        fingerprint: SHA-256 (16 hex digits) of weights and resizing: equal fingerprints, comparable features.
        num_features: D.
    """

    name: str
    fingerprint: str
    num_features: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


def get_extractor(name: str, *, weights: str | None = None, device: str = "cpu") -> Extractor:
    """An extractor by name.

    Args:
        weights: inception: a weights file (default: torch-fidelity's download); dinov2: folder or Hub id of a
            transformers model (default facebook/dinov2-large); efficientnet-lite0: a ``.pth`` (default: the package's).

    Raises:
        ValueError: unknown name, package missing or weights that do not fit; says what to do.
    """
    if name == "efficientnet-lite0":
        return EfficientNetExtractor(weights, device)
    if name == "inception":
        return InceptionExtractor(weights, device)
    if name == "dinov2":
        return Dinov2Extractor(weights, device)
    raise ValueError(f"unknown extractor {name!r}; choose one of {', '.join(DISTANCE_NAMES)}")


class EfficientNetExtractor:
    """EfficientNet-Lite0 on images whose smaller side is enlarged (bilinear) to 128 pixels at least; offline, no
    classifier."""

    name = "efficientnet-lite0"
    num_features = 1280
    side = 128

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        self.device = device
        self.network = EfficientNetLite(weights=weights).to(device)
        precision = b"bf16" if computes_bfloat16(device) else b"fp32"
        self.fingerprint = _digest([self.network.fingerprint.encode(), b"bilinear 128 " + precision])

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.of_pixels(images, self.side).cpu(), None


def _parts(images: Tensor, side: int) -> tuple[Tensor, ...]:
    """A few images (B, 3, H, W) at a time, for a network that brings them to ``side``."""
    return images.split(images_at_once(max(side, images.shape[-2]), max(side, images.shape[-1])))


class InceptionExtractor:
    """The Inception v3 of FID (1706.08500) in torch-fidelity's port: features of the last pooling, and its classes.

    torch-fidelity unpickles weights files itself; here they are read without running code and handed over.
    """

    name = "inception"
    num_features = 2048
    side = 299  # the network enlarges to it

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError as error:
            raise ValueError(
                f"the inception extractor needs torch-fidelity and torchvision ({error}); install them, "
                "or use --extractor efficientnet-lite0"
            ) from error
        state = _read_weights(weights) if weights else _download(inception.URL_INCEPTION_V3)
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_args, **_kwargs: state):
            try:
                network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
            except RuntimeError as error:
                raise ValueError(f"{weights}: not the weights of FID's Inception v3 ({str(error)[:200]})") from error
        self.device, self.network = device, network.to(device).eval()
        self.fingerprint = state_fingerprint(state, b"tensorflow bilinear 299")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = [self.network(part.to(self.device)) for part in _parts(images, self.side)]
        logits = torch.cat([part for _, part in found])
        return torch.cat([part for part, _ in found]).float().cpu(), logits.float().softmax(1).cpu()


@contextmanager
def spatial_features(extractor: Extractor) -> Iterator[list[Tensor]]:
    """A list of what sFID (2103.03841) compares, (B, ``SPATIAL_FEATURES``) float32 of all images that an Inception
    extractor sees meanwhile: the first 7 channels after the 1x1 convolution of the block Mixed_6d (in TensorFlow
    mixed_6), 17x17 positions, in the order of ADM's files (rows, columns, channels)."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor) -> None:
        found.append(output[:, :7].permute(0, 2, 3, 1).flatten(1).float().cpu())

    assert isinstance(extractor, InceptionExtractor)
    handle = extractor.network.Mixed_6d.branch1x1.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


class Dinov2Extractor:
    """DINOv2 (2304.07193) through transformers: the normalised class token, images at 224 pixels (2306.04675)."""

    name = "dinov2"
    side = 224

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise ValueError('the dinov2 extractor needs transformers: pip install "ecar[dinov2]"') from error
        source = weights or "facebook/dinov2-large"
        try:
            network = Dinov2Model.from_pretrained(source, use_safetensors=True)
        except Exception as error:
            raise ValueError(f"dinov2 weights {source!r}: {str(error).strip().splitlines()[0]}") from error
        self.device, self.network = device, nn.Module.to(network, device).eval()
        self.num_features = int(network.config.hidden_size)
        config = network.config.to_diff_dict()  # heads and activations change the features, not the weights
        config = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
        self.fingerprint = state_fingerprint(
            self.network.state_dict(), b"bicubic 224", json.dumps(config, sort_keys=True, default=str).encode()
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.cat([self._features(part) for part in _parts(images, self.side)]), None

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 255
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return self.network((x.clamp(0, 1) - mean) / std).last_hidden_state[:, 0].float().cpu()


def extract(extractor: Extractor, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor | None]:
    """Features (N, D), and probabilities (N, K) or None, of images (N, 3, H, W) uint8."""
    parts = [extractor(part) for part in images.split(batch_size)]
    probabilities = [p for _, p in parts if p is not None]
    return torch.cat([f for f, _ in parts]), torch.cat(probabilities) if probabilities else None


def state_fingerprint(state: dict[str, Tensor], *more: bytes) -> str:
    """SHA-256 (16 hex digits) over names and values of weights."""
    chunks = (c for k in sorted(state) for c in (k.encode(), state[k].detach().cpu().contiguous().float().numpy().data))
    return _digest([*chunks, *more])


def _digest(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def _read_weights(path: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--weights {path}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--weights {path}: not a readable weights file ({type(error).__name__})") from error


def _download(url: str) -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{url}: download failed ({error}); give the file with --weights") from error
