"""``ecar train``: train a model, or resume."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ecar.cli.options import parse
from ecar.config import TrainConfig


def run(arguments: Sequence[str]) -> None:
    """Parse, train, print the folder of the final model as JSON."""
    config = parse(TrainConfig, arguments, "train")
    from ecar.training.loop import train

    final = train(config)
    last = (final.parent / "log.jsonl").read_text().splitlines()[-1:]
    print(json.dumps({"model": str(final), **(json.loads(last[0]) if last else {})}))
