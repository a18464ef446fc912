"""The run's folder: checks before work starts, sample grids, the final model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ecar import __version__
from ecar.config import PATHS, ModelConfig, differences
from ecar.data.latents import LatentTable
from ecar.data.order import batch_indices
from ecar.files.records import read_json
from ecar.network.model import StageModel
from ecar.pretrained.folders import save_model
from ecar.sampling.pictures import grid
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import Tokenizer
from ecar.training.config import TrainConfig
from ecar.training.engine.checkpoint import has_checkpoint
from ecar.training.finetune import Source

_UNREADABLE = "restore it, or choose another --out"
# Options that may change when a run is resumed.
_FREE = {"out", "device", "compile", "log_every", "sample_every", "save_every", "trackers", "max_steps"}
_FREE |= {"lr", "clip", "dtype"}  # what a diverged run needs to change
_FREE |= {"allow_change"}
# How a step is computed, not what it computes.
_FREE |= {"accumulate", "activation_checkpointing", "parallel", "async_save", "stall_timeout"}


def make_out(out: str, data: str, *, pictures: bool = True) -> Path:
    """The output folder, made and proven writable; ValueError otherwise, and where ``pictures`` would be written into
    the folder of the data: they would be images of the next run."""
    if not out or not data:
        raise ValueError("--out and --data take a name, and one of them is empty")
    folder = Path(out).expanduser()
    if pictures and folder.resolve().is_relative_to(Path(data).expanduser().resolve()):
        raise ValueError(f"--out {out} lies inside --data {data}: choose a folder beside it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error.strerror})") from None
    return folder


# Properties of model and data that follow from an option, so that allowing one allows the others.
_DATA = {"images", "content", "velocity_std"}
_FOLLOW = {
    "data": _DATA, "split": _DATA, "image_column": _DATA, "label_column": _DATA,
    "max_images": _DATA, "images": _DATA, "flip": _DATA, "ends": {"stages", "velocity_std", "ends"},
    "rho": {"stages", "velocity_std"}, "resolution": {"stages", "image_side", "velocity_std"},
    "tokenizer": {"tokenizer", "velocity_std"}, "class_names": {"content"}, "content": _DATA - {"images"},
}  # fmt: skip


def check_same_options(path: Path, options: dict[str, object], allowed: tuple[str, ...] | None = None) -> str:
    """Write ``options`` to ``path``; where a checkpoint depends on what is there, only compare with that.

    Args:
        allowed: options that may differ; None: a run of which none may.

    Returns:
        What differs, in words; empty if nothing does.

    Raises:
        ValueError: the run there has other options; each is named.
    """
    now, changed = json.loads(json.dumps(options)), ""
    if has_checkpoint(path.parent):
        before = read_json(path, _UNREADABLE)
        changed = differences(before, now)
        if refused := differences(before, {k: v for k, v in now.items() if k not in (allowed or ())}):
            how = ", or allow the change (--allow-change)" if allowed is not None else ""
            raise ValueError(f"{path.parent} holds a run with other options ({refused}); choose another --out{how}")
    else:
        write_options(path, now)
    return changed


def write_options(path: Path, options: dict[str, object]) -> None:
    """``options`` as JSON in ``path``, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(options, indent=2) + "\n")
    temporary.replace(path)


def check_same_data(
    record: dict[str, Any], config: ModelConfig, table: LatentTable, allowed: tuple[str, ...] = ()
) -> str:
    """ValueError if the data no longer give the model and the order that the checkpoint was trained with, but for what
    is ``allowed`` and follows from it. Returns what differs, in words."""
    before = {**record["model"], "images": record["images"], "content": record["content"]}
    now = {**config.to_json(), "images": len(table), "content": table.content}
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    free = set(allowed).union(*(_FOLLOW.get(key, set()) for key in allowed))
    if refused := differences(before, {k: v for k, v in now.items() if k not in free}):
        raise ValueError(f"the data changed since the checkpoint ({refused}); restore them, or choose another --out")
    return differences(before, now)


def check_max_steps(asked: int, taken: int, out: Path) -> None:
    """ValueError where a run has taken more steps than are asked for: its record would name a number that is none."""
    if taken > asked:
        raise ValueError(
            f"{out} has taken {taken} steps already, more than --max-steps {asked}; ask for {taken} or more, or choose "
            f"another --out"
        )


def check_out(config: TrainConfig, out: Path) -> str:
    """ValueError if the folder holds a run of other options; those of a new run are written down. Returns what differs
    and is allowed to, in words: ``keep_options`` once the run has accepted its data too."""
    return check_same_options(out / "train.json", _options(config), config.allow_change)


def keep_options(config: TrainConfig, out: Path) -> None:
    """Write down options of a run that were allowed to change."""
    write_options(out / "train.json", _options(config))


def _options(config: TrainConfig) -> dict[str, object]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}


def save_batches(out: Path, config: TrainConfig, images: int, steps: range) -> None:
    """``non_finite.json``: what each of some steps (from 1) trained on, as rows of the images that are used: without
    those that were skipped, or left out by ``--max-images``."""
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


def _is_place(value: str) -> bool:
    """Whether it names something on this machine: a path, or a pattern of paths."""
    return Path(value).expanduser().exists() or any(letter in value for letter in "*?[{")


def save_final(
    model: StageModel, tokenizer: Tokenizer, config: TrainConfig, out: Path, decay: float, source: Source | None = None
) -> Path:
    """``out/final`` (``out/final_ema_DECAY`` for the averages that are not the first): averaged weights as a model
    folder, with a card of how they were made."""
    final = out / ("final" if decay == config.ema[0] else f"final_ema_{decay}")
    save_model(final, model, tokenizer, torch.float32)
    options = dataclasses.asdict(config)
    local = [n for n in PATHS if isinstance(options[n], str) and _is_place(options[n])]
    record = {"ecar": __version__, "torch": torch.__version__, **options, "ema": decay, "local_paths": local}
    if source is not None:
        record["source"] = source.record()
    (final / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return final
