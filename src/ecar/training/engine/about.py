"""What a run is: the first record of its log, enough to start it again elsewhere."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from ecar import __version__
from ecar.files.commit import source_commit
from ecar.training.engine.options import RunOptions


def run_record(
    run: RunOptions, about: dict[str, Any], world: int, rows: tuple[int, ...], accumulate: int
) -> dict[str, Any]:
    """Options as resolved, sizes, versions and machine, for a log.

    Args:
        run: options of the run; ``batch_size`` are the images of one update over all processes.
        about: what the task says of itself (``Task.about``).
        world: processes.
        rows: images per update that train each stage.
        accumulate: micro-batches.
    """
    device, images = str(run.device), about.get("images_in_data", 0)
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        **about,
        "effective_batch": run.batch_size,
        "batch_per_process": run.batch_size // (world * accumulate),
        "accumulate": accumulate,
        "processes": world,
        "rows_per_stage": list(rows),
        "steps": run.max_steps,
        "epochs": round(run.max_steps * run.batch_size / images, 3) if images else None,
        "versions": {
            "ecar": __version__,
            "commit": source_commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": {"name": device, "kind": torch.cuda.get_device_name(device) if cuda else platform.processor()},
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "command": sys.argv,
    }
