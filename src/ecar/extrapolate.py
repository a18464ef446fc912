"""Weights beyond a model, away from what a short training on its own samples made of it (Neon, 2510.03597).

    w_new = w + s (w_base - w_away)        w_base: the model itself, or the teacher that it was distilled from

A sampler draws likely images too often. Trained on them, a model gets worse in a direction that the step back mends; it
costs nothing in sampling.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ecar.config import ModelConfig, differences
from ecar.data.files import read_json
from ecar.weights import load_model, resolve_model, save_model, weights_fingerprint

# Of the training that is stepped away from.
_HOW = ("data", "max_steps", "batch_size", "optimizer", "lr", "ema", "seed")


def beyond(
    weights: dict[str, Tensor], base: dict[str, Tensor], away: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """``weights + scale (base - away)`` of states with the same names and shapes."""
    return {name: w + scale * (base[name] - away[name]) for name, w in weights.items()}


def extrapolate(name: str, away_from: str, scale: float, out: str, base: str | None = None) -> Path:
    """Write the model folder ``out``.

    Args:
        name: the model: folder, bundled name or Hub id. Its settings and tokenizer are the new model's.
        away_from: the model that a training made of ``base`` (``ecar train --init-from BASE --data self:NUM``).
        scale: s, how far; 0 is the model itself, 1 as far as the training went, the other way.
        out: a new or empty folder.
        base: the model that this training started from; None: ``name``. A student moves as its teacher does.

    Raises:
        ValueError: models of different shape or data, the same weights twice, a scale that is no number above 0, or a
            folder that holds something.
    """
    folder = Path(out).expanduser()
    if not out or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"--out {out!r}: give a new or empty folder")
    if not 0 < scale < math.inf:
        raise ValueError(f"--scale is a number above 0, got {scale}")
    start = name if base is None else base
    before, after = weights_fingerprint(start), weights_fingerprint(away_from)
    if before == after:
        raise ValueError(f"{away_from} has the weights of {start}: there is nothing to step away from")
    model, tokenizer = load_model(name)
    ours, theirs = _shape(model.config), model if base is None else load_model(base)[0]
    away, _ = load_model(away_from)
    for other, config in ((start, theirs.config), (away_from, away.config)):
        if apart := differences(ours, _shape(config)):
            raise ValueError(f"{name} and {other} are not of one kind: they differ in {apart}")
    model.load_state_dict(beyond(model.state_dict(), theirs.state_dict(), away.state_dict(), scale))
    save_model(folder, model, tokenizer)
    record = _record(resolve_model(name))
    how = {key: value for key, value in _record(resolve_model(away_from)).items() if key in _HOW}
    if not str(how.get("data", "")).startswith("self:"):  # a place on some machine
        how.pop("data", None)
    whose = {"weights": weights_fingerprint(name), "base": before, "away_from": after}
    record["extrapolated"] = {**whose, "scale": scale, "training": how}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _shape(config: ModelConfig) -> dict[str, Any]:
    """All of a configuration but how it is sampled."""
    return dataclasses.replace(config, sampling=None).to_json()


def _record(folder: Path) -> dict[str, Any]:
    """How a model was trained, where that is known."""
    path = folder / "training.json"
    return dict(read_json(path, "delete it")) if path.exists() else {}
