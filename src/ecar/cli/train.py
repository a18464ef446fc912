"""``ecar train``: train a model, or resume."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from ecar.cli.options import parse
from ecar.training.config import TrainConfig

OPTIONS = TrainConfig


def run(arguments: Sequence[str]) -> None:
    """Parse, train, print the folder of the final model as JSON.

    Stopped by a signal, it exits with 75 (SIGTERM, SIGUSR1) or 130 (Ctrl-C) after a checkpoint.
    """
    config = parse(TrainConfig, arguments, "train")
    from ecar.processes.signals import exit_when_stopped
    from ecar.training.engine.log import read_log
    from ecar.training.loop import train

    with exit_when_stopped():
        final = train(config)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process says it
        return
    # A run that was finished already has only a start in its log.
    last = [line for line in read_log(final.parent) if "loss" in line][-1:]
    print(json.dumps({"model": str(final), **(last[0] if last else {})}))
