"""The run's folder: checks before work starts, sample grids, the final model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ecar import __version__
from ecar.config import ModelConfig, differences
from ecar.data.order import batch_indices
from ecar.model import StageModel
from ecar.sampling.pictures import grid
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import Tokenizer
from ecar.training.config import TrainConfig
from ecar.weights import save_model

# Options that may change when a run is resumed.
_FREE = {"out", "device", "compile", "log_every", "sample_every", "save_every", "trackers", "max_steps"}
_FREE |= {"lr", "clip", "dtype"}  # what a diverged run needs to change


def make_out(out: str) -> Path:
    """The output folder, made and proven writable; ValueError otherwise."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error.strerror})") from None
    return folder


def check_same_options(path: Path, options: dict[str, object], defaults: dict[str, object] | None = None) -> None:
    """Write ``options`` to ``path``, or compare with what is there once a checkpoint depends on it.

    Args:
        defaults: what an option that is newer than the run there stood for.

    Raises:
        ValueError: the run there has other options; each is named.
    """
    now = json.loads(json.dumps(options))
    if path.exists() and any(path.parent.glob("checkpoints/step_*")):
        before = {**(defaults or {}), **json.loads(path.read_text())}
        if changed := differences(before, now):
            raise ValueError(f"{path.parent} holds a run with other options ({changed}); choose another --out")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(now, indent=2) + "\n")
    temporary.replace(path)


def check_same_data(record: dict[str, Any], config: ModelConfig, images: int) -> None:
    """ValueError if the data no longer give the model and the order that the checkpoint was trained with."""
    if "model" not in record:
        return
    model = ModelConfig.from_json(record["model"]).to_json()  # fields that are newer than the checkpoint: defaults
    before, now = {**model, "images": record["images"]}, {**config.to_json(), "images": images}
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    if changed := differences(before, now):
        raise ValueError(f"the data changed since the checkpoint ({changed}); restore them, or choose another --out")


def check_out(config: TrainConfig, out: Path) -> None:
    """ValueError if the folder holds a run of other options; otherwise write down those of this one."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    check_same_options(out / "train.json", options, {"model": "ecar"})


def save_batches(out: Path, config: TrainConfig, images: int, steps: range) -> None:
    """``non_finite.json``: the rows of the data set that each of some steps (from 1) trained on."""
    rows = {step: batch_indices(images, config.batch_size, config.seed, step - 1).tolist() for step in steps}
    (out / "non_finite.json").write_text(json.dumps(rows) + "\n")


def save_samples(model: StageModel, tokenizer: Tokenizer, out: Path, step: int) -> Path:
    """A grid of fixed seeds, one row per class (at most ten), as ``samples/step_N.png``."""
    classes = min(model.config.num_classes, 10)
    columns = 8
    labels = [label for label in range(classes) for _ in range(columns)] if classes else None
    seeds = list(range(len(labels) if labels else columns * 4))
    images = Pipeline(model, tokenizer)(labels=labels, seeds=seeds).images
    path = out / "samples" / f"step_{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    grid(images, columns, scale=2 if images[0].width < 64 else 1).save(path)
    return path


def save_final(model: StageModel, tokenizer: Tokenizer, config: TrainConfig, out: Path) -> Path:
    """``out/final``: the averaged weights as a model folder, with a card of how they were made."""
    final = out / "final"
    save_model(final, model, tokenizer, torch.float32)
    record = {"ecar": __version__, "torch": torch.__version__, **dataclasses.asdict(config)}
    (final / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return final
