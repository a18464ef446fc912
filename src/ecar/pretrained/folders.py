"""Model folders: ``config.json``, ``model.safetensors`` and ``tokenizer/``. Nothing here ever unpickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ecar.config import ModelConfig
from ecar.files.access import check_readable
from ecar.files.records import read_json
from ecar.files.remote import check_repo_id, hub_reason
from ecar.files.tensors import (
    CONVERT,
    PICKLES,
    about,
    load_weights,
    tensors_fingerprint,
    write_tensors,
)
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.tokenizers import Tokenizer, load_tokenizer

BUNDLED = Path(__file__).parent.parent / "bundled"
_FORMAT = 1


def bundled_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def resolve_model(name: str | Path) -> Path:
    """A bundled name, folder or Hub id -> local folder.

    Raises:
        ValueError: nothing of that name, or the folder of a training, whose model is one folder deeper.
    """
    text = str(name)
    if "/" not in text and (BUNDLED / text / "config.json").exists():
        return BUNDLED / text
    path = Path(text).expanduser()
    check_readable(path)
    if path.is_file():
        pickle = path.suffix in PICKLES
        reason = "a pickle may run code and is never loaded" if pickle else "not a model folder"
        how = f"; {CONVERT.format(text, 'model.safetensors')}" if pickle else ""
        raise ValueError(f"{text}: {reason}; give the folder with config.json and model.safetensors{how}")
    if path.is_dir():
        _check_no_run(path)
        return path
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"model {text!r} not found: no such folder; bundled models: {', '.join(bundled_models())}")
    return _download(text)


def _check_no_run(folder: Path) -> None:
    """ValueError for a folder of ``ecar train`` or ``ecar tokenizer``: says where the model is."""
    if (folder / "config.json").exists():
        return
    final = folder / "final"
    if (final / "config.json").exists():
        raise ValueError(f"{folder}: the folder of a training, not of a model; use {final}")
    if (folder / "log.jsonl").exists():
        raise ValueError(f"{folder}: a training that has not written its model yet; ecar train writes it to {final}")


def _download(text: str) -> Path:
    """``OWNER/NAME`` or ``OWNER/NAME@REVISION`` from the Hub, or from its cache where there is no network."""
    repo, _, revision = text.partition("@")
    check_repo_id(repo)
    from huggingface_hub import snapshot_download

    patterns, outside = ["*.json", "*.safetensors", "*.md"], ["../*", "*/../*", "/*"]
    try:
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=patterns, ignore_patterns=outside, library_name="ecar"
        )
    except Exception as error:
        raise ValueError(f"model {text!r}: no such folder, and from the Hub: {hub_reason(error)}") from error
    return Path(folder)


def critic_file(folder: Path) -> Path | None:
    """The critic in a model folder (``ecar critic``), where there is one."""
    path = folder / "critic.safetensors"
    return path if path.is_file() else None


def save_model(folder: Path, model: StageModel, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Write a model folder; ``dtype`` is that of the stored weights."""
    tokenizer.save(folder / "tokenizer", dtype)  # first: it may refuse
    weights = {name: t.detach().to(dtype) for name, t in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights, about_model(model, tokenizer))
    record = {"format": _FORMAT, "library": "ecar", "model": model.config.to_json()}
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def about_model(model: StageModel, tokenizer: Tokenizer, name: str = "", license: str | None = None) -> dict[str, str]:
    """Metadata of a model's weights file: the model's name (default: its kind and sizes), tokenizer and licence."""
    config, (height, width) = model.config, model.config.image_side or (0, 0)
    sizes = (
        f"{config.kind}, {height}x{width} pixels, {config.num_classes} classes, {model.num_parameters():,} parameters"
    )
    its = f"{tokenizer.kind} {tokenizer.fingerprint()}"
    return about(model=name or sizes, tokenizer=its, license=license or "not stated")


def load_config(folder: Path) -> ModelConfig:
    """The model configuration of a folder; ValueError says what is wrong with it."""
    path = folder / "config.json"
    check_readable(path)
    if not path.exists():
        raise ValueError(f"{folder}: no config.json there; a model folder has config.json and model.safetensors")
    record = read_json(path, "give another model")
    if record.get("library") != "ecar" or "model" not in record:
        raise ValueError(f"{path}: not the configuration of an ecar model")
    if record.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {record.get('format')!r} is not {_FORMAT}; another version of ecar wrote it")
    try:
        return ModelConfig.from_json(record["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def weights_fingerprint(name: str | Path) -> str:
    """SHA-256 (16 hex digits) of the weights file of a model, without its metadata: says which model drew an image."""
    path = resolve_model(name) / "model.safetensors"
    check_readable(path)
    if not path.is_file():
        raise ValueError(f"{path.parent}: no model.safetensors there; a run's model is in its folder final")
    return tensors_fingerprint(path)


def load_model(name: str | Path) -> tuple[StageModel, Tokenizer]:
    """Model (float32, in evaluation mode) and tokenizer of a folder, bundled name or Hub id.

    Raises:
        ValueError: anything missing, damaged, of another shape, or a tokenizer that is not the model's own.
    """
    folder = resolve_model(name)
    config = load_config(folder)
    model = build_model(config)
    load_weights(model, folder / "model.safetensors")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if config.tokenizer and tokenizer.fingerprint() != config.tokenizer:
        raise ValueError(
            f"{folder}: the model was trained on latents of tokenizer {config.tokenizer}, "
            f"but the folder holds tokenizer {tokenizer.fingerprint()}"
        )
    return model.eval(), tokenizer.eval()


def how_trained(folder: Path) -> dict[str, Any]:
    """The options of the run that made a model folder, as it wrote them; empty where they are not known."""
    path = folder / "training.json"
    return read_json(path, "delete it") if path.exists() else {}
