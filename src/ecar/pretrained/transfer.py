"""Weights of one model into another: what fits is copied, classes of the same name keep their rows, the rest is named.

Positions are functions of the image coordinates, so sides never matter; names and shapes do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ecar.config import ModelConfig, match_names
from ecar.network.model import StageModel
from ecar.stages import make_plan

_CLASS_TABLES = (".class_embedding.weight", ".class_embedder.embedding_table.weight")  # ours, and diffusers' in dit
_STAGE_TABLES = (".stage_embedding.weight",)


@dataclass(frozen=True)
class Transfer:
    """What ``transfer`` did.

    Attributes:
        fresh: names of parameters that are not the source's, as a whole or in some rows.
        notes: the same and what of the source was left out, in words, one entry each.
    """

    fresh: tuple[str, ...]
    notes: tuple[str, ...]


@torch.no_grad()
def transfer(source: dict[str, Tensor], before: ModelConfig, model: StageModel) -> Transfer:
    """Fill ``model`` from the weights of a model of configuration ``before``, in place.

    Args:
        source: state of the other model.
        before: its configuration.
        model: freshly initialised; what the source does not have stays as it is.

    Raises:
        ValueError: another kind, width or number of heads: no weight would mean the same.
    """
    now = model.config
    check_fits(before, now)
    classes, stages = class_rows(before, now), stage_rows(before, now)
    fresh: list[str] = []
    notes: list[str] = []
    for name, own in model.state_dict().items():
        theirs = source.get(name)
        if theirs is None:
            fresh.append(name)
        elif name.endswith(_CLASS_TABLES + _STAGE_TABLES):
            rows = classes if name.endswith(_CLASS_TABLES) else stages
            for row, place in rows.items():
                own[row] = theirs[place]
            if set(rows) != set(range(len(own))):
                fresh.append(name)
        elif theirs.shape == own.shape:
            own.copy_(theirs)
        else:
            fresh.append(name)
    tables = [name for name in fresh if name.endswith(_CLASS_TABLES + _STAGE_TABLES) and name in source]
    notes += _listed("initialised fresh", [name for name in fresh if name not in tables])
    notes += _listed("left out of the source", sorted(set(source) - set(model.state_dict())))
    notes += _rows_in_words(before, now, classes, stages)
    return Transfer(tuple(fresh), tuple(notes))


def check_fits(before: ModelConfig, now: ModelConfig) -> None:
    """ValueError where no weight of a model of ``before`` would mean anything in one of ``now``."""
    for name in ("kind", "width", "heads", "patch"):
        if getattr(before, name) != getattr(now, name):
            raise ValueError(
                f"nothing of a model with {name} {getattr(before, name)} fits one with {name} {getattr(now, name)}; "
                f"leave the option (or --preset) out, or leave out --init-from"
            )


def class_rows(before: ModelConfig, now: ModelConfig) -> dict[int, int]:
    """Row of the new class table -> row of the old one, for classes that are the same: by name (``match_names``),
    by number where neither has names; the null class always."""
    rows = {now.null_class: before.null_class}
    if not now.class_names and not before.class_names and now.num_classes == before.num_classes:
        return rows | {i: i for i in range(now.num_classes)}
    return rows | match_names(now.class_names, before.class_names)


def stage_rows(before: ModelConfig, now: ModelConfig) -> dict[int, int]:
    """Row of the new stage table -> row of the old one: by number in plans of the same length; else a stage is the
    same where its data levels a_k -> b_k are."""
    old, new = make_plan(before.stages), make_plan(now.stages)
    if len(old) == len(new):
        return {i: i for i in range(len(new))}
    levels = {(round(s.start, 6), round(s.end, 6)): s.index for s in old}
    found = {s.index: levels.get((round(s.start, 6), round(s.end, 6))) for s in new}
    return {index: place for index, place in found.items() if place is not None}


def _listed(what: str, names: list[str]) -> list[str]:
    """Whole layers as one entry each: the parameters of a block or a linear layer go together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        depth = next((i + 2 for i, part in enumerate(parts) if part.endswith("blocks")), len(parts) - 1)
        groups.setdefault(".".join(parts[:depth]), []).append(name)
    return [f"{what}: {group} ({len(members)} parameters)" for group, members in groups.items()]


def _rows_in_words(before: ModelConfig, now: ModelConfig, classes: dict[int, int], stages: dict[int, int]) -> list[str]:
    notes, kept = [], set(classes.values())
    if new := [_class(now, i) for i in range(now.num_classes) if i not in classes]:
        notes.append(f"initialised fresh: the rows of {len(new)} of {now.num_classes} classes ({_some(new)})")
    if gone := [_class(before, i) for i in range(before.num_classes) if i not in kept]:
        notes.append(f"left out of the source: the rows of {len(gone)} classes ({_some(gone)})")
    if now.has_trunk:
        sides = (("initialised fresh", now, stages.keys()), ("left out of the source", before, stages.values()))
        for what, config, known in sides:
            count = len(config.stages.sides)
            if missing := [str(i + 1) for i in range(count) if i not in known]:
                notes.append(f"{what}: the stage rows of stage {', '.join(missing)} of {count}")
    return notes


def _class(config: ModelConfig, index: int) -> str:
    return config.class_names[index] if config.class_names else str(index)


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
