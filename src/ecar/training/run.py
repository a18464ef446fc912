"""What a run of ``ecar train`` compares and writes: data, sample grids, the final model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ecar import __version__
from ecar.config import PATHS, ModelConfig, differences
from ecar.data.latents import LatentTable
from ecar.files.options import flat
from ecar.network.model import StageModel
from ecar.pretrained.folders import save_model
from ecar.sampling.pictures import grid
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import Tokenizer
from ecar.training.config import Training
from ecar.training.finetune import Source


def check_same_data(record: dict[str, Any], config: ModelConfig, table: LatentTable) -> None:
    """ValueError if the data no longer give the model and the order that the checkpoint was trained with."""
    before = {**record["model"], "images": record["images"], "content": record["content"]}
    now = {**config.to_json(), "images": len(table), "content": table.content}
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    if refused := differences(before, now):
        raise ValueError(f"the data changed since the checkpoint ({refused}); restore them, or choose another --out")


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


def _is_place(value: str) -> bool:
    """Whether it names something on this machine: a path, or a pattern of paths."""
    return Path(value).expanduser().exists() or any(letter in value for letter in "*?[{")


def save_final(
    model: StageModel, tokenizer: Tokenizer, config: Training, out: Path, decay: float, source: Source | None = None
) -> Path:
    """``out/final`` (``out/final_ema_DECAY`` for the averages that are not the first): averaged weights as a model
    folder, with a card of how they were made."""
    final = out / ("final" if decay == config.optimizer.ema[0] else f"final_ema_{decay}")
    save_model(final, model, tokenizer, torch.float32)
    options = flat(config)
    local = [n for n in PATHS if isinstance(options[n], str) and _is_place(options[n])]
    record = {"ecar": __version__, "torch": torch.__version__, **options, "ema": decay, "local_paths": local}
    if source is not None:
        record["source"] = source.record()
    (final / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return final
