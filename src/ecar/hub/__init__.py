"""Publishing: a model as the folder that the Hub would hold (weights, tokenizer, card, samples), and its upload."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ecar.config import PATHS, CardOptions
from ecar.files.options import read_tables, recipe_text
from ecar.files.records import read_json
from ecar.files.remote import check_repo_id, hub_reason
from ecar.files.tensors import copy_tensors
from ecar.hub.card import card_text
from ecar.pretrained.build import build_model
from ecar.pretrained.folders import about_model, critic_file, save_model, weights_fingerprint
from ecar.sampling.pictures import grid

if TYPE_CHECKING:
    from ecar.sampling.pipeline import Pipeline

_PUBLISHED = Path(__file__).parent / "published"  # model_index.json and the code that diffusers runs
_PRIVATE = ("out", "config", "device")  # of training.json and recipe.toml: where it ran, not how


def write_folder(pipe: Pipeline, folder: Path, repo_id: str, card: CardOptions, source: Path | None = None) -> None:
    """Write what would be uploaded: weights and configuration, tokenizer, ``README.md``, ``samples.png``, the code with
    which diffusers loads it, and the run's ``recipe.toml`` and ``report.html`` where there are any.

    Args:
        pipe: the model, not optimised.
        folder: empty or new.
        repo_id: OWNER/NAME that the card names.
        card: what the card should say besides.
        source: the folder that the model was loaded from: its weights are copied as they are, but for their metadata,
            with ``training.json``.

    Raises:
        ValueError: a folder with other files, an optimised model, a decoder that is not the model's, a record or
            picture that cannot be read, an evaluation of other weights.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; give a new folder")
    if pipe.decoder is not pipe.tokenizer:
        raise ValueError("the model is drawn with another decoder than its own, which would not be published with it")
    record = _evaluation(card.evaluation)
    if record is not None and source is not None:
        _check_weights(card, record, weights_fingerprint(source))
    picture, training = _picture(pipe, card.picture, source), training_record(source)
    recipe = _recipe(path, training) if (path := _of_run(source, "recipe.toml")) else None
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(pipe, folder, about_model(pipe.model, pipe.tokenizer, repo_id, card.license), source)
    if record is not None:
        _check_weights(card, record, weights_fingerprint(folder))
    if training:
        (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    if recipe:
        (folder / "recipe.toml").write_text(recipe)
    if report := _of_run(source, "report.html"):
        shutil.copyfile(report, folder / report.name)
    picture.save(folder / "samples.png")
    shutil.copytree(_PUBLISHED, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    (folder / "README.md").write_text(card_text(pipe, repo_id, card, record, training))


def _write_weights(pipe: Pipeline, folder: Path, about: dict[str, str], source: Path | None) -> None:
    if source is None:
        with torch.device("meta"):
            expected = set(build_model(pipe.model.config).state_dict())
        if set(pipe.model.state_dict()) != expected:
            raise ValueError("an optimised (packed) model cannot be saved: load it again without compile")
        save_model(folder, pipe.model, pipe.tokenizer)
        copy_tensors(folder / "model.safetensors", folder / "model.safetensors", about)
        return
    shutil.copyfile(source / "config.json", folder / "config.json")
    copy_tensors(source / "model.safetensors", folder / "model.safetensors", about)
    if critic := critic_file(source):
        shutil.copyfile(critic, folder / critic.name)
    shutil.copytree(source / "tokenizer", folder / "tokenizer", copy_function=shutil.copyfile)


def _of_run(source: Path | None, name: str) -> Path | None:
    """A file of the run, which lies in the model's folder, or above ``final``."""
    places = [] if source is None else [source, *([source.parent] if source.name.startswith("final") else [])]
    return next((place / name for place in places if (place / name).is_file()), None)


def _recipe(path: Path, training: dict[str, Any]) -> str:
    """A recipe without places on the machine where it ran."""
    values = read_tables(path, "delete it, and the recipe is left out")
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        for name in [name for name in part if name in _PRIVATE]:
            del part[name]
        for name in PATHS:
            if isinstance(part.get(name), str):  # a table may be called so too
                part[name] = training.get(name, _last_name(part[name]))
    return recipe_text(values)


def push_folder(folder: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Create the repository where there is none and upload the folder in one commit; returns the commit's address.

    Raises:
        ValueError: an id that cannot be one, no network, no permission: one line, and what to do.
    """
    check_repo_id(repo_id)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="ecar")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        done = api.upload_folder(
            repo_id=repo_id, folder_path=str(folder), repo_type="model", commit_message="Upload with ecar"
        )
    except Exception as error:
        raise ValueError(
            f"cannot upload to {repo_id!r}: {hub_reason(error)}; log in with `hf auth login` (a token that may write), "
            "or write the folder with --dry-run and upload it elsewhere with `hf upload`"
        ) from error
    return str(getattr(done, "commit_url", None) or f"https://huggingface.co/{repo_id}")


def push(
    pipe: Pipeline,
    repo_id: str,
    card: CardOptions | None = None,
    *,
    private: bool = False,
    source: Path | None = None,
    api: Any = None,
) -> str:
    """Upload model, tokenizer, card and samples to the Hub in one commit.

    Args:
        pipe: the model, not optimised, with its own decoder.
        repo_id: OWNER/NAME, made where there is none.
        card: what the card should say besides: licence, data sets, figures of an evaluation, a picture.
        private: whether a new repository is private.
        source: the folder that the model was loaded from: its weights are copied as they are, with ``training.json``.
        api: in place of huggingface_hub's ``HfApi``.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as ``write_folder`` and ``push_folder``.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_folder(pipe, folder, repo_id, card or CardOptions(), source)
        return push_folder(folder, repo_id, private=private, api=api)


def _evaluation(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    record = read_json(Path(path).expanduser(), "give another --evaluation")
    if not {"metrics", "extractor", "reference", "settings"} <= set(record):
        raise ValueError(f"--evaluation {path}: not the record of an `ecar evaluate --model ...`")
    return record


def _check_weights(card: CardOptions, record: dict[str, Any], fingerprint: str) -> None:
    if record.get("adapter") is not None:
        raise ValueError(f"{card.evaluation}: a record of the model with an adapter, and these are its weights alone")
    if record.get("weights") != fingerprint:
        raise ValueError(f"{card.evaluation}: a record of weights {record.get('weights')}, not these ({fingerprint})")


def training_record(source: Path | None) -> dict[str, Any]:
    """The options of the run that made a model folder, without places on the machine where it ran; {}: unknown."""
    path = source / "training.json" if source else None
    if path is None or not path.exists():
        return {}
    everything = read_json(path, "delete it, and the card leaves the training out")
    record = {k: v for k, v in everything.items() if k not in _PRIVATE}
    local = record.pop("local_paths", [])
    places = [(record, name, name) for name in PATHS] + [(record.get("source", {}), "name", "init_from")]
    for part, key, option in places:
        if key in part:
            part[key] = _last_name(part[key], option in local)
    return record


def _last_name(value: Any, local: bool = False) -> Any:
    """Of a place on this machine its last name, of a Hub id all of it."""
    place = isinstance(value, str) and (local or value.startswith(("/", ".", "~")) or Path(value).exists())
    return Path(value).name if place else value


def _picture(pipe: Pipeline, path: str | None, source: Path | None) -> Image.Image:
    # The run's own grids are of its first average, which is in ``final``.
    found = sorted((source.parent / "samples").glob("step_*.png")) if source and source.name == "final" else []
    if path is None and not found:
        classes = min(len(pipe.class_names), 8)
        labels = [label for label in range(classes) for _ in range(16 // classes)] if classes else None
        images = pipe(labels=labels, seeds=range(len(labels) if labels else 16)).images
        return grid(images, 16 // classes if classes else 4)
    file = Path(path).expanduser() if path else found[-1]
    try:
        return Image.open(file).convert("RGB")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error}); give another --picture") from None
