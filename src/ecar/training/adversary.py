"""The adversary of a decoder (VQGAN, 2012.09841): a network that tells decoded patches from real ones.

What pixels and features in the mean do not ask for, the decoder leaves out, and its images are smooth. The adversary
learns what is missing (hinge loss, 1705.02894), and the decoder follows its gradient beside that of the other terms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar.devices import mixed_precision

_LEARNING_RATE = 1e-3
_WARM_UP = 150  # updates of the adversary before the decoder hears of it: one that has learnt nothing leads astray
_MOST = 1.0  # of the factor below: where an adversary is beaten its gradient vanishes, and the factor would grow
_JITTER = 0.03  # standard deviation of noise on real images that must not change the verdict: a cheap form of R1
_JITTER_WEIGHT = 0.5


class Adversary:
    """Patches of 26 pixels, 0.17 million parameters.

    Args:
        weight: length of its gradient with respect to the decoded images, as a share of that of the other terms.
        device: where the images are.
        seed: of its weights and its noise.
    """

    def __init__(self, weight: float, device: str, seed: int) -> None:
        self.weight, self.seed, self.updates = weight, seed, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Conv2d(3, 48, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(48, 96, 4, 2, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(96, 128, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(128, 1, 3, 1, 1),
            )  # fmt: skip
        self.network.to(device)
        parameters = self.network.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=(0.5, 0.95), weight_decay=0.0)

    def oppose(self, decoded: Tensor) -> None:
        """Let the backward pass that is to come through ``decoded`` (B, 3, H, W) also lead towards what the adversary
        takes for real. The gradient that arrives there sets the length of what is added."""
        if self.updates < _WARM_UP:
            return
        seen = decoded.detach().requires_grad_()
        (towards,) = torch.autograd.grad(-self.network(seen).float().mean(), seen)

        def add(gradient: Tensor) -> Tensor:
            factor = self.weight * gradient.norm() / towards.norm().clamp_min(1e-12)
            return gradient + factor.clamp_max(_MOST) * towards

        decoded.register_hook(add)

    def learn(self, real: Tensor, decoded: Tensor) -> Tensor:
        """One update on images (B, 3, H, W) in [-1, 1]; the hinge loss, 2 where nothing can be told apart."""
        self.updates += 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.updates)
        noise = torch.randn(real.shape, generator=generator).to(real.device)
        with mixed_precision(real.device):
            verdicts = self.network(torch.cat([real, decoded.detach(), real + _JITTER * noise]))
        truth, fake, jittered = verdicts.float().chunk(3)
        hinge = F.relu(1 - truth).mean() + F.relu(1 + fake).mean()
        self.optimizer.zero_grad(set_to_none=True)
        (hinge + _JITTER_WEIGHT * (truth - jittered).square().mean()).backward()
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
