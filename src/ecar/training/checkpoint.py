"""Checkpoints: a folder of safetensors and JSON, written beside its place and renamed, never half there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecar.training.ema import EMA


def save_checkpoint(run: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any], keep: int = 2) -> Path:
    """Write ``run/checkpoints/step_N``; older ones are deleted only afterwards and ``keep`` of them stay."""
    root = run / "checkpoints"
    target, temporary = root / f"step_{step:08d}", root / f"step_{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **record}, indent=1) + "\n")
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in _complete(root)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and record of the newest complete checkpoint, or None where there is none.

    Raises:
        ValueError: the newest checkpoint cannot be read.
    """
    found = _complete(run / "checkpoints")
    if not found:
        return None
    try:
        return load_file(found[-1] / "state.safetensors"), json.loads((found[-1] / "state.json").read_text())
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{found[-1]}: damaged checkpoint ({error}); delete it to resume from the one before"
        ) from None


def training_tensors(module: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that training needs to go on, flat: ``model.*``, ``ema.*``, ``optimizer.J.I.*``."""
    tensors = {f"model.{n}": t for n, t in module.state_dict().items()}
    tensors |= {f"ema.{n}": t for n, t in ema.weights.items()}
    for j, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{j}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors


def restore_training(
    tensors: dict[str, Tensor], module: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]
) -> None:
    """The inverse of ``training_tensors``, in place."""
    module.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    for name, average in ema.weights.items():
        average.copy_(tensors[f"ema.{name}"])
    for j, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{j}."):
                _, _, index, key = name.split(".", 3)
                states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _complete(root: Path) -> list[Path]:
    folders = [p for p in root.glob("step_*") if p.suffix != ".tmp" and (p / "state.json").exists()]
    return sorted(folders)
