"""``ecar neon``: negative extrapolation from self-training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ecar.cli.flags import Model
from ecar.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class NeonOptions:
    """Extrapolate a model negatively from short trainings on its own samples (Neon, arXiv 2510.03597): better samples
    at the same sampling cost, without data."""

    model: Model
    """Folder, bundled name or Hub id."""
    trained: tuple[str, ...]
    """Models that self-training made of MODEL (folder final of `ecar train --init-from MODEL --data self:NUM`). Of
    several, trained with different --seed, the mean counts, which has less noise."""
    base: str | None = None
    """Model that the self-training started from, where it was not MODEL: the teacher of a distilled MODEL, which
    cannot train on its own samples itself."""
    out: str
    """Folder to write, new or empty."""
    scale: float = 1.0
    """Extrapolation weight: 1 is as far as the training went, in the opposite direction. Try 0.5 to 2, and compare
    them with ecar evaluate."""


OPTIONS = NeonOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, write the model folder, print its name and weights as JSON."""
    options = parse(NeonOptions, arguments, "neon")
    from ecar.pretrained.folders import weights_fingerprint
    from ecar.refine.neon import neon

    folder = neon(options.model, options.trained, options.scale, options.out, options.base)
    print(json.dumps({"model": str(folder), "weights": weights_fingerprint(folder)}))
