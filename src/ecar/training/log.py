"""Logs of a run: JSONL always, TensorBoard where it is installed. A tracker that fails never stops training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class RunLog:
    """Appends one JSON object per logged step to ``run/log.jsonl`` and mirrors numbers to TensorBoard.

    Args:
        run: the run's folder.
        step: the step resumed from; later lines of an interrupted run are dropped, since they will come again.
    """

    def __init__(self, run: Path, *, step: int = 0, tensorboard: bool = True) -> None:
        self.path = run / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.strip() and json.loads(line).get("step", 0) <= step]
        self.path.write_text("".join(line + "\n" for line in kept) if step else "")
        self.seconds_before = max((json.loads(line).get("seconds", 0.0) for line in kept), default=0.0) if step else 0.0
        self.writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step)
            except ImportError:
                print("tensorboard is not installed: logging to log.jsonl only", file=sys.stderr)

    def write(self, **values: Any) -> None:
        """One line; ``step`` must be among the values."""
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
        self._mirror(lambda w: [w.add_scalar(k, v, values["step"]) for k, v in values.items() if _is_number(v)])

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture file for TensorBoard."""
        self._mirror(lambda w: w.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC"))

    def _mirror(self, action: Any) -> None:
        if self.writer is None:
            return
        try:
            action(self.writer)
            self.writer.flush()
        except Exception as error:
            print(f"tensorboard failed and is off from here on: {error}", file=sys.stderr)
            self.writer = None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
