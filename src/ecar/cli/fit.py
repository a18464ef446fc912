"""``ecar fit``: a folder of pictures becomes a model and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ecar.cli.options import parse
from ecar.fitting.options import FitConfig

OPTIONS = FitConfig


def run(arguments: Sequence[str]) -> None:
    """Parse, fit or go on, print a summary as JSON. Stopped by a signal, it exits as ``ecar train`` does."""
    words = list(arguments)
    if words and not words[0].startswith("-"):  # ecar fit PHOTOS: a recipe has it as --data
        words.insert(0, "--data")
    config = parse(FitConfig, words, "fit")
    from ecar.fitting.run import fit
    from ecar.processes.signals import exit_when_stopped

    with exit_when_stopped():
        summary = fit(config)
    print(json.dumps(summary))
