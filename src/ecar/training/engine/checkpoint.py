"""Checkpoints: a folder of safetensors and JSON, written beside its place and renamed, never half there.

``manifest.json`` holds the SHA-256 of every file: safetensors loads a flipped bit without a word.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ecar.files.access import check_readable
from ecar.files.records import flush
from ecar.files.tensors import write_tensors
from ecar.training.engine.ema import EMA
from ecar.training.engine.parallel import cut

_MANIFEST, _STATE = "manifest.json", "state.safetensors"


def save_checkpoint(run: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any], keep: int = 2) -> Path:
    """Write ``run/checkpoints/step_N``; older ones are deleted only afterwards and ``keep`` of them stay.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    root = run / "checkpoints"
    folder, target = root / f"step_{step:08d}.tmp", root / f"step_{step:08d}"
    for left in root.glob("step_*.tmp"):  # by a save that failed: it takes the room that this one needs
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True)
    write_tensors(folder / _STATE, tensors)
    (folder / "state.json").write_text(json.dumps({"step": step, **record}, indent=1) + "\n")
    hashes = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(hashes, indent=1) + "\n")
    for path in (*folder.iterdir(), folder):
        flush(path)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    flush(root)
    for old in _complete(root)[:-keep]:
        shutil.rmtree(old)
    return target


def find_checkpoint(run: Path) -> Path | None:
    """The newest sound checkpoint, or None where there is none. Damaged ones and leftovers of a killed save are named
    on stderr.

    Raises:
        ValueError: there are checkpoints, and none is sound, or one may not be read.
    """
    root = run / "checkpoints"
    for stale in root.glob("step_*.tmp"):
        print(f"{stale}: left by a save that was killed; removed", file=sys.stderr)
        shutil.rmtree(stale)
    found, faults = _complete(root), []
    for folder in reversed(found):
        for path in (folder, *folder.glob("*")):
            check_readable(path)
        try:
            verify(folder)
            return folder
        except (ValueError, OSError) as error:
            faults.append(f"{folder}: damaged checkpoint ({error})")
            print(f"{faults[-1]}; trying the one before", file=sys.stderr)
    if faults:
        raise ValueError(f"{'; '.join(faults)}; no other is left: choose another --out, or delete them to start again")
    return None


def has_checkpoint(run: Path) -> bool:
    """Whether ``find_checkpoint`` would look at any (sound or not)."""
    return bool(_complete(run / "checkpoints"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, on CPU."""
    return load_file(folder / _STATE)


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: ``step`` and what was given to the save."""
    return json.loads((folder / "state.json").read_text())


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        ValueError: a file is missing or has another hash; it is named.
    """
    if not (folder / _MANIFEST).exists():
        raise ValueError(f"{_MANIFEST} is missing")
    try:
        hashes = dict(json.loads((folder / _MANIFEST).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{_MANIFEST}: not readable ({error})") from None
    for name, expected in hashes.items():
        if not (folder / name).exists():
            raise ValueError(f"{name} is missing")
        if _sha256(folder / name) != expected:
            raise ValueError(f"{name}: hash mismatch")


def training_tensors(module: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that training needs to go on, flat: ``model.*``, ``ema.*``, ``ema_DECAY.*``, ``optimizer.J.I.*``."""
    tensors = {f"model.{n}": t for n, t in module.state_dict().items()}
    tensors |= ema.tensors()
    for j, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{j}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors


def restore_training(
    tensors: dict[str, Tensor], module: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]
) -> None:
    """The inverse of ``training_tensors``, in place."""
    own = module.state_dict()
    model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    module.load_state_dict({name: cut(tensor, own[name]) for name, tensor in model.items()})
    ema.restore(tensors)
    for j, optimizer in enumerate(optimizers):
        _restore_optimizer(tensors, j, optimizer)


def _restore_optimizer(tensors: dict[str, Tensor], j: int, optimizer: torch.optim.Optimizer) -> None:
    """State of the j-th optimizer from flat tensors; the options stay its own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"optimizer.{j}."):
            _, _, index, key = name.split(".", 3)
            like = parameters[int(index)]
            states.setdefault(int(index), {})[key] = cut(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _complete(root: Path) -> list[Path]:
    """Checkpoints that were put in their places, in their order; a damaged one is still one, to be named. A copy under
    another name (``step_best``) is its owner's."""
    return sorted(path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
