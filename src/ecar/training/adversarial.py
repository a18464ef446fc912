"""An adversarial term for autoencoders: a critic that tells decoded patches from real ones, and is trained beside them.

Absolute and perceptual errors are smallest for a blurred guess where the latent does not say what the texture was; a
critic prefers one that is sharp (VQGAN, 2012.09841). Hinge losses (1705.02894, 1802.05957):

    critic    mean max(0, 1 - c(x)) + mean max(0, 1 + c(dec))
    decoder   - mean c(dec)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnitConv(nn.Conv2d):
    """A convolution whose filters have norm 1, so that what it can amplify is bounded without a second derivative or a
    power iteration: (B, C, h, w) -> (B, D, h', w')."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class PatchCritic(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] -> one score per patch (B, 1, H / 4, W / 4), larger where it looks real; each sees
    22 x 22 pixels."""

    def __init__(self, width: int = 64) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((3, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            kernel = 4 if stride == 2 else 3
            layers += [UnitConv(before, after, kernel, stride, padding=1), nn.LeakyReLU(0.2)]
        super().__init__(*layers, UnitConv(2 * width, 1, 3, padding=1))


class Adversary:
    """A critic and its optimizer.

    Args:
        device: where images are.
    """

    def __init__(self, device: str) -> None:
        self.critic = PatchCritic().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), betas=(0.5, 0.9), weight_decay=0.01)

    def loss(self, decoded: Tensor) -> Tensor:
        """What the decoder wants small; the critic's own weights get no gradient."""
        self.critic.requires_grad_(False)
        score = self.critic(decoded)
        self.critic.requires_grad_(True)
        return -score.float().mean()

    def update(self, images: Tensor, decoded: Tensor, lr: float) -> Tensor:
        """One step of the critic at rate ``lr``; its loss, below 2 where it sees a difference."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        real, fake = self.critic(torch.cat([images, decoded.detach()])).float().chunk(2)
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, for a checkpoint: ``critic.*``."""
        return {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``, in place."""
        own = {n.removeprefix("critic."): t for n, t in tensors.items() if n.startswith("critic.")}
        self.critic.load_state_dict(own)
