"""examples/standalone.py and the library are the same method."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from conftest import random_model, tiny_config
from ecar.config import SamplingConfig
from ecar.pretrained.folders import save_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.tokenizers import PixelTokenizer
from ecar.training.loss import Draws, stage_losses


def standalone() -> Any:
    path = Path(__file__).parent.parent / "examples" / "standalone.py"
    spec = importlib.util.spec_from_file_location("standalone", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_same_weights_same_noise_same_loss_and_latents(tmp_path: Path) -> None:
    module, model = standalone(), random_model(tiny_config())
    save_model(tmp_path, model, PixelTokenizer(factor=1))
    other = module.load(tmp_path)
    noise = draw_noise([1, 2, 3], model.plan, 3)
    es, contexts = [n.fresh for n in noise], [n.context for n in noise[1:] if n.context is not None]
    labels, z, times = torch.tensor([0, 2, 3]), torch.randn(3, 3, *model.plan[-1].side), torch.rand(3, 3)
    ours = stage_losses(model, z, labels, Draws(es, contexts, times), (3, 3, 3))
    theirs = module.loss(other, z, labels, es, contexts, times)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    for solver in ("euler", "ab2"):
        settings = SamplingConfig(
            steps=(3, 2, 1), guidance=(2.0, 1.0, 1.5), guidance_from=(0.5, 0.0, 0.0), solver=solver
        )
        how = settings.steps, settings.guidance, settings.guidance_from, solver
        theirs = module.sample(other, labels, es, contexts, *how)
        assert torch.allclose(sample_latents(model, labels, noise, settings), theirs, atol=1e-4)
