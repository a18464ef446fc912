"""Neon: negative extrapolation from self-training (2510.03597).

    w_new = w + s (w_base - w_own)        w_base: the model itself, or the teacher that it was distilled from
                                          w_own: mean of what trainings of w_base on its own samples made of it

A sampler draws likely images too often. Trained on them, a model gets worse in one direction; extrapolating the other
way makes it better, and costs nothing in sampling. Most of what one such training does to the weights is chance, and
differs from seed to seed: the mean of several keeps what they share, and bears a larger scale.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ecar.config import ModelConfig, differences
from ecar.pretrained.folders import how_trained, load_model, resolve_model, save_model, weights_fingerprint

# What the record keeps of each self-training.
_HOW = ("data", "max_steps", "batch_size", "optimizer", "lr", "ema", "seed", "stage_share")


def beyond(
    weights: dict[str, Tensor], base: dict[str, Tensor], own: Sequence[dict[str, Tensor]], scale: float
) -> dict[str, Tensor]:
    """``weights + scale (base - mean of own)`` of states with the same names and shapes."""
    return {n: w + scale * (base[n] - sum(state[n] for state in own) / len(own)) for n, w in weights.items()}


def neon(name: str, trained: Sequence[str], scale: float, out: str, base: str | None = None) -> Path:
    """Write the model folder ``out``: the model, negatively extrapolated from its self-trainings.

    Args:
        name: the model: folder, bundled name or Hub id. Its settings and tokenizer are the new model's.
        trained: the models that self-trainings made of ``base``, one or more (``ecar train --init-from BASE --data
            self:NUM --seed ...``).
        scale: s, how far; 0 is the model itself, 1 as far as the trainings went, the other way.
        out: a new or empty folder.
        base: the model that this training started from; None: ``name``. A student moves as its teacher does.

    Raises:
        ValueError: models of different shape or data, the same weights twice, a scale that is no number above 0, or a
            folder that holds something.
    """
    folder = Path(out).expanduser()
    if not out or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"`out` {out!r}: give a new or empty folder")
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be a number above 0, got {scale}")
    if not trained:
        raise ValueError("`trained` needs what a training on own samples made, one model or more")
    start = name if base is None else base
    before, after = weights_fingerprint(start), [weights_fingerprint(own) for own in trained]
    if before in after:
        raise ValueError(
            f"{trained[after.index(before)]} has the weights of {start}: there is nothing to extrapolate from"
        )
    if len(set(after)) < len(after):
        raise ValueError(f"`trained` {' '.join(trained)}: the same weights twice; give every training its own --seed")
    model, tokenizer = load_model(name)
    ours, theirs = _shape(model.config), model if base is None else load_model(base)[0]
    own = [load_model(folder)[0] for folder in trained]
    for other, config in zip((start, *trained), (theirs.config, *(m.config for m in own)), strict=True):
        if apart := differences(ours, _shape(config)):
            raise ValueError(f"{name} and {other} are not of one kind: they differ in {apart}")
    states = [m.state_dict() for m in own]
    model.load_state_dict(beyond(model.state_dict(), theirs.state_dict(), states, scale))
    save_model(folder, model, tokenizer)
    record = how_trained(resolve_model(name))
    whose = {"weights": before if base is None else weights_fingerprint(name), "base": before, "trained": after}
    record["neon"] = {**whose, "scale": scale, "trainings": [_how(own) for own in trained]}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _shape(config: ModelConfig) -> dict[str, Any]:
    """All of a configuration but how it is sampled."""
    return dataclasses.replace(config, sampling=None).to_json()


def _how(trained: str) -> dict[str, Any]:
    """What is worth keeping of how ``trained`` was trained."""
    how = {key: value for key, value in how_trained(resolve_model(trained)).items() if key in _HOW}
    if not str(how.get("data", "")).startswith("self:"):  # a place on some machine
        how.pop("data", None)
    return how
