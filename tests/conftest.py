"""Small, seeded, offline, on CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.config import ModelConfig, SamplingConfig, StageConfig
from ecar.network.model import ECAR, StageModel
from ecar.pretrained.build import build_model
from ecar.sampling.edit import begin_maps
from ecar.stages import Stage
from ecar.training.engine.checkpoint import find_checkpoint, read_record, read_tensors

sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]  # runs need seconds for it
# Threads beyond the cores wait for each other by spinning: minutes instead of seconds.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
elif "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, CORES))


def tiny_config(**changes: object) -> ModelConfig:
    """Three stages, not square, ten thousand weights."""
    base = ModelConfig(
        stages=StageConfig(sides=((2, 3), (4, 6), (8, 12)), ends=(0.7, 0.8, 1.0), rho=0.7),
        channels=3,
        width=16,
        heads=2,
        trunk_depth=2,
        head_depth=2,
        num_classes=3,
        class_names=("cat", "dog", "Red bird"),
        velocity_std=(1.1, 0.9, 1.0),
        image_side=(8, 12),
        sampling=SamplingConfig(steps=(3, 2, 2), guidance=(1.0, 1.0, 1.0)),
    )
    return base.replace(**changes)


def random_model(config: ModelConfig, seed: int = 0) -> ECAR:
    """A model whose zero-initialised layers are filled too, so that every path matters."""
    torch.manual_seed(seed)
    model = ECAR(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 / parameter.shape[1] ** 0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def begins(plan: Sequence[Stage], strength: float) -> tuple[float, ...]:
    """Of each stage the time from which an edit of the whole picture draws it."""
    maps = begin_maps(plan, np.ones(plan[-1].side, dtype=bool), strength)
    assert all(len(set(times.flatten())) == 1 for times in maps)
    return tuple(float(times.flat[0]) for times in maps)


def load_checkpoint(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and record of the newest sound checkpoint, if there is any."""
    folder = find_checkpoint(run)
    return None if folder is None else (read_tensors(folder), read_record(folder))


def random_dit(side: int) -> StageModel:
    """A DiT of one stage on images of ``side`` pixels, with its zero-initialised layers filled."""
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            kind="dit", stages=StageConfig(sides=((side, side),), ends=(1.0,)), channels=3, width=16, heads=2,
            trunk_depth=0, head_depth=1, num_classes=3, context_noise=0.0, image_side=(side, side),
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def model() -> ECAR:
    return random_model(tiny_config())


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real data in milliseconds: scikit-learn's digits 0, 1 and 7 as PNG files in class subfolders."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for name, digit in (("zero", 0), ("one", 1), ("seven", 7)):
        (folder / name).mkdir()
        for index, image in enumerate(data.images[data.target == digit][:40]):
            pixels = np.clip(image * 16, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(folder / name / f"{index}.png")
    return folder
