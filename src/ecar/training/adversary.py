"""The adversary of a decoder (VQGAN, 2012.09841): a network that tells decoded images from real ones.

What pixels and features in the mean do not ask for, the decoder leaves out, and its images are smooth. The adversary
learns what is missing (hinge loss, 1705.02894), and the decoder follows its gradient beside that of the other terms.
Most of it is known beforehand: heads on maps of a frozen EfficientNet-Lite2 (as in Projected GANs, 2111.01007) learn in
hundreds of updates what a network from scratch would need hundreds of thousands for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.devices import mixed_precision
from ecar.evaluation.features import EfficientNetLite

_LEARNING_RATE = 1e-3
_WARM_UP = 100  # updates of the adversary before the decoder hears of it: one that has learnt nothing leads astray
_BLOCKS = {0: 16, 3: 24, 6: 48, 10: 88}  # of EfficientNet-Lite2, at strides 2, 4, 8 and 16, and their channels
_HIDDEN = 64


class Verdicts(nn.Module):
    """Heads on the pixels and on each map of features."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Sequential(
            nn.Conv2d(3, 48, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(48, 96, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(96, 128, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(128, 1, 3, 1, 1),
        )  # fmt: skip
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, _HIDDEN, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(_HIDDEN, _HIDDEN, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(_HIDDEN, 1, 1),
            )
            for channels in _BLOCKS.values()
        )  # fmt: skip

    def forward(self, images: Tensor, maps: list[Tensor]) -> list[Tensor]:
        return [self.pixels(images), *(head(m) for head, m in zip(self.heads, maps, strict=True))]


class Adversary:
    """Patches of 26 pixels and features of four strides; 0.4 million trained parameters.

    Args:
        weight: length of its gradient with respect to the decoded images, as a share of that of the other terms.
        device: where the images are.
        seed: of its weights.

    Raises:
        ValueError: the weights of EfficientNet-Lite2 are not installed.
    """

    def __init__(self, weight: float, device: str, seed: int) -> None:
        self.weight, self.updates = weight, 0
        self.features = EfficientNetLite(2).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Verdicts()
        self.network.to(device)
        parameters = self.network.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=(0.5, 0.95), weight_decay=0.0)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Features of unit mean square at every position: strides differ in scale by orders of magnitude."""
        layers = self.features.layers(images, max(_BLOCKS))
        return [F.normalize(layers[1 + b].float(), dim=1) * c**0.5 for b, c in _BLOCKS.items()]

    def verdicts(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> five maps (B, 1, h, w), float32; larger is more real."""
        with mixed_precision(images.device):
            return [v.float() for v in self.network(images, self._maps(images))]

    def oppose(self, decoded: Tensor) -> None:
        """Let the backward pass that is to come through ``decoded`` (B, 3, H, W) also lead towards what the adversary
        takes for real. The gradient that arrives there sets the length of what is added."""
        if self.updates < _WARM_UP:
            return
        seen = decoded.detach().requires_grad_()
        (towards,) = torch.autograd.grad(-torch.stack([v.mean() for v in self.verdicts(seen)]).sum(), seen)

        def add(gradient: Tensor) -> Tensor:
            return gradient + self.weight * gradient.norm() / towards.norm().clamp_min(1e-12) * towards

        decoded.register_hook(add)

    def learn(self, real: Tensor, decoded: Tensor) -> Tensor:
        """One update on images (B, 3, H, W) in [-1, 1]; the mean hinge loss, 2 where nothing can be told apart."""
        self.updates += 1
        images = torch.cat([real, decoded.detach()])
        with mixed_precision(images.device):
            with torch.no_grad():
                maps = self._maps(images)
            verdicts = [v.float().chunk(2) for v in self.network(images, maps)]
        hinge = torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in verdicts]).mean()
        self.optimizer.zero_grad(set_to_none=True)
        hinge.backward()
        self.optimizer.step()
        return hinge.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, for a checkpoint; the optimizer's state goes with the other optimizers'."""
        return {f"adversary.{name}": tensor for name, tensor in self.network.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """The inverse of ``tensors``, after so many updates."""
        prefix = "adversary."
        self.network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.updates = updates
