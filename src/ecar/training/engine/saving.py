"""What a failed save means for a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from ecar.processes.world import World
from ecar.training.engine.checkpoint import save_checkpoint
from ecar.training.engine.log import RunLog

MAX_FAILED_SAVES = 3


class Saver:
    """Writes the checkpoints of a run.

    A disk that is full now may have room at the next save: only several failures in a row end the run, and one of the
    last save. Rank 0 counts; a failure that ends it there ends the others too.

    Args:
        out: folder of the run.
        world: the processes; all of them have to make the same calls.
        log: of rank 0.
        saved: step of the newest checkpoint there.
    """

    def __init__(self, out: Path, world: World, log: RunLog | None, *, saved: int) -> None:
        self.out, self.world, self.log, self.saved = out, world, log, saved
        self._failures = 0

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any], *, last: bool) -> None:
        """Save; a failure that does not end the run is said and logged.

        Raises:
            OSError: this was the last try (see the class), or the ``last`` save failed.
        """
        try:
            if self.world.rank == 0:
                save_checkpoint(self.out, step, tensors, record)
        except OSError as error:
            self._failures += 1
            if last or self._failures >= MAX_FAILED_SAVES:
                raise
            if self.log is not None:
                message = f"WARNING: step {step}: no checkpoint ({error}); training goes on"
                print(message, file=sys.stderr, flush=True)
                self.log.write(step=step, failed_save=str(error))
        else:
            self._failures, self.saved = 0, step
