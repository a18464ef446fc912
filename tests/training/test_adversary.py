"""The adversary of a decoder: what it adds to the gradient, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ecar.training import adversary as module
from ecar.training.adversary import Adversary


def gradient(adversary: Adversary, images: torch.Tensor) -> torch.Tensor:
    decoded = images.clone().requires_grad_()
    seen = decoded * 1.0
    adversary.oppose(seen)
    (1e-3 * seen.square().sum()).backward()
    assert decoded.grad is not None
    return decoded.grad


def test_what_is_added_is_as_long_as_asked_for_and_only_after_the_warm_up() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    adversary = Adversary(0.2, "cpu", 0)
    alone = 2e-3 * images
    assert torch.equal(gradient(adversary, images), alone)
    adversary.updates = module._WARM_UP
    added = gradient(adversary, images) - alone
    assert float(added.norm() / alone.norm()) == pytest.approx(0.2, rel=1e-4)
    assert all(p.grad is None for p in adversary.network.parameters())  # the decoder's step teaches it nothing


def test_it_learns_to_tell_smooth_images_from_real_ones_and_points_away_from_them() -> None:
    generator = torch.Generator().manual_seed(0)
    adversary = Adversary(1.0, "cpu", 0)
    for _ in range(60):
        real = torch.randint(0, 2, (16, 3, 16, 16), generator=generator) * 1.6 - 0.8
        hinge = adversary.learn(real, F.avg_pool2d(real, 3, 1, 1))
    assert float(hinge) < 0.5
    smooth = F.avg_pool2d(real, 3, 1, 1)
    seen = smooth.clone().requires_grad_()
    verdict(adversary, seen).backward()
    assert seen.grad is not None
    sharper = smooth + 1e-2 * seen.grad / seen.grad.abs().mean()
    assert float(verdict(adversary, sharper).detach()) > float(verdict(adversary, smooth).detach())


def verdict(adversary: Adversary, images: torch.Tensor) -> torch.Tensor:
    return torch.stack([v.mean() for v in adversary.verdicts(images)]).sum()
