"""``ecar extrapolate``: weights away from those of a training on own samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ecar.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class ExtrapolateOptions:
    """Step away from what short trainings on its own samples made of a model (Neon, 2510.03597): better samples at the
    same cost."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, bundled name or Hub id."""
    away_from: tuple[str, ...]
    """What `ecar train --init-from MODEL --data self:NUM` made of it: its folder final; of several such runs, each with
    its own --seed, the mean counts: most of what one does to the weights is chance."""
    base: str | None = None
    """What the training started from, where it was not MODEL: the teacher that MODEL was distilled from. A model for
    fixed steps cannot train on its own samples, and moves as its teacher does."""
    out: str
    """Folder to write, new or empty."""
    scale: float = 1.0
    """How far: 1 is as far as the training went, the other way. Try 0.5 to 2, and judge each with ecar evaluate."""


def run(arguments: Sequence[str]) -> None:
    """Parse, write the model folder, print its name and weights as JSON."""
    options = parse(ExtrapolateOptions, arguments, "extrapolate")
    from ecar.pretrained.folders import weights_fingerprint
    from ecar.refine.neon import extrapolate

    folder = extrapolate(options.model, options.away_from, options.scale, options.out, options.base)
    print(json.dumps({"model": str(folder), "weights": weights_fingerprint(folder)}))
