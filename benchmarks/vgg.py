"""VGG16 of the package stlpips-pytorch, which travels with its weights: ST-LPIPS (2207.13686), and an extractor for
Frechet distance and KID that shares no ancestry with EfficientNet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.devices import computes_bfloat16
from ecar.evaluation.extractors import state_fingerprint

Distance = Callable[[Tensor, Tensor], Tensor]
# stlpips_pytorch imports these names of packages that it does not ask for, and uses none of them here.
_UNUSED = {"torchvision": "models", "torchsummary": "summary", "IPython": "embed"}


def _network() -> nn.Module:
    """LPIPS on shift-tolerant VGG16; ImportError without the package."""
    missing = [name for name in _UNUSED if find_spec(name) is None]
    for name in missing:
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], _UNUSED[name], None)
    try:
        from stlpips_pytorch.stlpips import LPIPS
    finally:
        for name in missing:
            del sys.modules[name]
    network: nn.Module = LPIPS(net="vgg", variant="shift_tolerant", verbose=False).requires_grad_(False)
    return network


def st_lpips() -> Distance | None:
    """Distance (B,) of images in [-1, 1], or None where the package is missing."""
    try:
        network = _network()
    except ImportError as error:
        print(f"st_lpips is left out: pip install stlpips-pytorch ({error})", file=sys.stderr)
        return None
    return lambda one, other: network(one, other).flatten()


class VggExtractor:
    """Means over positions of VGG16's last convolution, (B, 512), of images whose smaller side is 128 pixels. As in
    LPIPS, the channels of a position have unit length; times the root of 512, so that KID's kernel sees values near 1.

    An ``ecar.evaluation.extractors.Extractor``. Computes in bfloat16 where the processor does.

    Raises:
        ValueError: the package is missing.
    """

    name = "vgg16"
    num_features = 512
    side = 128

    def __init__(self) -> None:
        try:
            whole = _network()
        except ImportError as error:
            raise ValueError(f"the extractor vgg16 needs a package: pip install stlpips-pytorch ({error})") from error
        self.dtype = torch.bfloat16 if computes_bfloat16("cpu") else torch.float32
        self.fingerprint = state_fingerprint(whole.state_dict(), f"bilinear 128 unit length {self.dtype}".encode())
        self.scale = whole.get_submodule("scaling_layer")
        # channels_last: a third less time on an EPYC
        self.network = whole.get_submodule("net").to(self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return torch.cat([self._features(part) for part in images.split(50)]), None

    def _features(self, images: Tensor) -> Tensor:
        ratio = self.side / min(images.shape[2:])
        x = F.interpolate(images.float(), scale_factor=ratio, mode="bilinear", antialias=True, align_corners=False)
        x = self.scale(x / 127.5 - 1).to(self.dtype, memory_format=torch.channels_last)
        maps: Tensor = self.network(x)[-1].float()
        return F.normalize(maps, dim=1).mean((2, 3)) * self.num_features**0.5
