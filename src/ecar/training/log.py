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
        records = [r for r in _read(self.path) if r.get("step", 0) <= step] if step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records))
        temporary.replace(self.path)
        self.seconds_before = max((r.get("seconds", 0.0) for r in records), default=0.0)
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


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one torn by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"{path}: a torn line was dropped", file=sys.stderr)
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
