"""The critic: how much likelier an image is among real ones than among a model's samples, from frozen features.

A classifier that tells real images from samples knows the ratio p_real / p_model (its odds). Of K candidates, one drawn
with probability in proportion to that ratio is distributed as the real images are, as K grows (sampling importance
resampling, Rubin 1988; of generative models: discriminator rejection sampling, 1810.06758). The classifier is linear
in features of a network that was trained for something else: one that reads latents finds the sampler's fine errors,
which all candidates share, and chooses no better ones (docs/study.md).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ecar.evaluation.features import EfficientNetLite
from ecar.files.access import check_readable
from ecar.files.tensors import write_tensors

_SIDE = 96  # the smaller side of an image is enlarged to this at least, as the network was trained on large ones
_FORMAT = "1"
_TENSORS = ("weight", "bias", "quantiles")


class Features(nn.Module):
    """What the critic reads: EfficientNet-Lite2 (not the network of the metrics), in bfloat16 where the device does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite(2)

    @property
    def fingerprint(self) -> str:
        """Of the network's weights."""
        return self.network.fingerprint

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> (B, 1280)."""
        return self.network.of_pixels(images, _SIDE)


class Critic(nn.Module):
    """Logarithm of p_real(image | class) / p_model(image | class), up to a constant.

    Args:
        features: the frozen network.
        tensors: ``weight`` (R, D) and ``bias`` (R,): a row for each class and a last one for none; or one for all. And
            ``quantiles`` (R, Q) of the scores of the model's samples, evenly spread, for acceptance.
        about: the model and settings whose samples it was fitted to, and how.

    Attributes:
        fingerprint: SHA-256 (16 hex digits) of the file that it was read from; empty: of none.
    """

    weight: Tensor
    bias: Tensor
    quantiles: Tensor

    def __init__(self, features: Features, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        super().__init__()
        self.features, self.about, self.fingerprint = features, about, ""
        for name in _TENSORS:
            self.register_buffer(name, tensors[name].float())

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 and class ids (B,); ids beyond the classes are none -> (B,)."""
        return self.of_features(self.features(images), labels.to(self.weight.device))

    def of_features(self, features: Tensor, labels: Tensor) -> Tensor:
        """The same from what ``features`` gives, (B, D)."""
        rows = labels.clamp(max=len(self.weight) - 1)
        return (features * self.weight[rows]).sum(1) + self.bias[rows]

    def levels(self, labels: Tensor, acceptance: float) -> Tensor:
        """Scores (B,) from which samples of these classes are accepted for sure, so that of all samples a share of
        ``acceptance`` is accepted by ``accepts``."""
        found = levels_of(self.quantiles, acceptance, float(self.about["power"]))
        return found[labels.cpu().clamp(max=len(found) - 1)]

    def save(self, path: Path) -> None:
        """Write a ``.safetensors`` file; ``load_critic`` reads it."""
        metadata = {"ecar": json.dumps({"format": _FORMAT, "features": self.features.fingerprint, **self.about})}
        write_tensors(path, dict(self.named_buffers(recurse=False)), metadata)


def load_critic(path: str | Path) -> Critic:
    """The critic in a file.

    Raises:
        ValueError: no such file, not a critic, or one of other features than those installed.
    """
    path = Path(path).expanduser()
    check_readable(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `ecar critic` makes one")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["ecar"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        if about.pop("format") != _FORMAT:
            raise KeyError("format")
        known, rows = about.pop("features"), len(tensors["bias"])
        if tensors["weight"].shape != (rows, EfficientNetLite.num_features) or not 0 < float(about["power"]) <= 10:
            raise KeyError("weight")
        if tensors["quantiles"].ndim != 2 or len(tensors["quantiles"]) != rows:
            raise KeyError("quantiles")
    except Exception as error:
        raise ValueError(f"{path}: not a critic of ecar critic ({type(error).__name__})") from error
    features = Features()
    if known != features.fingerprint:
        raise ValueError(f"{path}: reads features {known}, and those installed are {features.fingerprint}")
    critic = Critic(features, tensors, about).eval()
    critic.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return critic


def accepts(log_ratio: Tensor, levels: Tensor, uniform: Tensor, power: float) -> Tensor:
    """Whether each sample is shown, with probability min(1, (ratio / ratio at the level)^power): rejection sampling,
    cut off at the level (1810.06758). Of all samples that a model draws, it throws away the worst; of K that are
    drawn in any case, ``choose`` also throws away good ones.

    Args:
        log_ratio: (B,), the critic's.
        levels: (B,), of ``Critic.levels``.
        uniform: (B,) in (0, 1), independent.
        power: the critic's.
    """
    return uniform.double().cpu().log() < power * (log_ratio.double().cpu() - levels)


def levels_of(scores: Tensor, acceptance: float, power: float) -> Tensor:
    """Levels (R,) at which a share of ``acceptance`` of each row of scores (R, M) is accepted, by bisection."""
    scores = scores.double().cpu()
    low, high = scores.min(1).values - 60 / power, scores.max(1).values  # of the former all are accepted
    for _ in range(60):
        middle = (low + high) / 2
        share = (power * (scores - middle[:, None])).clamp(max=0).exp().mean(1)
        low, high = torch.where(share > acceptance, middle, low), torch.where(share > acceptance, high, middle)
    return low


def choose(log_ratio: Tensor, uniform: Tensor, power: float) -> Tensor:
    """One candidate of each row, with probability in proportion to ratio^power (the Gumbel-max rule).

    Args:
        log_ratio: (B, K), the critic's.
        uniform: (B, K) in (0, 1), independent.
        power: 1 leads to the real distribution as K grows; of few candidates more than 1 comes nearer to it.

    Returns:
        (B,) indices.
    """
    gumbel = -torch.log(-torch.log(uniform.double().clamp(1e-12, 1 - 1e-12)))
    return (power * log_ratio.double().cpu() + gumbel.cpu()).argmax(1)
