"""The study's scripts: what they sample and count is what the library does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import random_model, tiny_config
from ecar.benchmark.flops import sampling_flops
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import PixelTokenizer


@pytest.fixture(scope="module")
def curve() -> ModuleType:
    pytest.importorskip("torchmetrics")
    path = Path(__file__).parents[1] / "studies" / "curve.py"
    spec = importlib.util.spec_from_file_location("curve", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_teacher_with_a_guide_samples_and_costs_what_its_parts_do(curve: ModuleType) -> None:
    """Guide off: the pipeline's own latents, guided by classes or not. On: others, and its passes paid."""
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    weak = random_model(tiny_config(trunk_depth=1, head_depth=1), seed=1)
    labels, noise = torch.tensor([0, 1]), draw_noise([3, 4], pipe.model.plan, 3)
    costs = []
    for guidance in ("1", "2,1,1.5"):
        text = f"3,2,2:{guidance}:ab2:velocity:0"
        settings = curve.parse_setting(text, pipe)
        with torch.no_grad():
            plain = sample_latents(pipe.model, labels, noise, settings)
            off, on = (
                curve.teacher_latents(curve.parse_teacher(f"{text}:{away}", pipe, weak), labels, noise, settings)
                for away in ("1", "1.5")
            )
        assert torch.allclose(off, plain, atol=1e-4) and not torch.allclose(on, plain, atol=1e-2)
        teacher = curve.parse_teacher(f"{text}:1.5", pipe, weak)
        costs.append((curve.teacher_flops(pipe, teacher, settings)["model"], sampling_flops(pipe, settings)["model"]))
    (unguided, own), (guided, own_guided) = costs
    theirs = sampling_flops(Pipeline(weak, PixelTokenizer(factor=1)), curve.parse_setting("3,2,2", pipe))["model"]
    assert own + theirs <= unguided < 1.5 * (own + theirs) and own_guided + theirs <= guided
