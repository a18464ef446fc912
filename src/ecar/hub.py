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
from ecar.files.records import read_json
from ecar.files.remote import check_repo_id, hub_reason
from ecar.pretrained.build import build_model
from ecar.pretrained.folders import critic_file, save_model, weights_fingerprint
from ecar.sampling.pictures import grid

if TYPE_CHECKING:
    from ecar.sampling.pipeline import Pipeline

_PRIVATE = ("out", "config", "device")  # of training.json: where it ran, not how
_NOT_METRICS = {"num", "against", "biased_small_sample"}


def write_folder(pipe: Pipeline, folder: Path, repo_id: str, card: CardOptions, source: Path | None = None) -> None:
    """Write what would be uploaded: weights and configuration, tokenizer, ``README.md``, ``samples.png``.

    Args:
        pipe: the model, not optimised.
        folder: empty or new.
        repo_id: OWNER/NAME that the card names.
        card: what the card should say besides.
        source: the folder that the model was loaded from: its weights are copied as they are, with ``training.json``.

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
        _check_judged(card, record, weights_fingerprint(source))
    picture = _picture(pipe, card.picture, source)
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        with torch.device("meta"):
            expected = set(build_model(pipe.model.config).state_dict())
        if set(pipe.model.state_dict()) != expected:
            raise ValueError("an optimised (packed) model cannot be saved: load it again without compile")
        save_model(folder, pipe.model, pipe.tokenizer)
    else:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(source / name, folder / name)
        if critic := critic_file(source):
            shutil.copyfile(critic, folder / critic.name)
        shutil.copytree(source / "tokenizer", folder / "tokenizer", copy_function=shutil.copyfile)
    if record is not None:
        _check_judged(card, record, weights_fingerprint(folder))
    training = training_record(source)
    if training:
        (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    picture.save(folder / "samples.png")
    (folder / "README.md").write_text(_card(pipe, repo_id, card, record, training, folder))


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
    try:
        record = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--evaluation {path}: cannot be read ({error})") from None
    if not isinstance(record, dict) or not {"metrics", "extractor", "reference", "settings"} <= set(record):
        raise ValueError(f"--evaluation {path}: not the record of an `ecar evaluate --model ...`")
    return record


def _check_judged(card: CardOptions, record: dict[str, Any], fingerprint: str) -> None:
    if record.get("adapter") is not None:
        raise ValueError(f"{card.evaluation}: judged the model with an adapter, and these are its weights alone")
    if record.get("weights") != fingerprint:
        raise ValueError(f"{card.evaluation}: judged weights {record.get('weights')}, not these ({fingerprint})")


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
        value = part.get(key)
        if isinstance(value, str) and (option in local or value.startswith(("/", ".", "~")) or Path(value).exists()):
            part[key] = Path(value).name
    return record


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


def _results(record: dict[str, Any], task: str) -> list[Any]:
    from huggingface_hub import EvalResult

    settings, metrics = record["settings"], record["metrics"]
    arguments = {
        "extractor": record["extractor"]["name"],
        "num": metrics["num"],
        "guidance": settings["guidance"],
        "steps": settings["steps"],
        "seed": record.get("seed"),
        "commit": record.get("commit"),
        "command": _command(record),
    }
    name = Path(record["reference"]["name"]).name
    return [
        EvalResult(
            task_type=task, dataset_type=name, dataset_name=name, metric_type=metric.split(" ")[0].lower(),
            metric_name=f"{metric}, N = {metrics['num']}", metric_value=value, metric_args=arguments,
        )
        for metric, value in metrics.items()
        if metric not in _NOT_METRICS and isinstance(value, int | float)
    ]  # fmt: skip


def _command(record: dict[str, Any]) -> str:
    words = ["ecar evaluate"]
    for name, value in record.get("command", {}).items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *(Path(v).name if str(v).startswith("/") else str(v) for v in values)]
    return " ".join(words)


def _card(
    pipe: Pipeline,
    repo_id: str,
    card: CardOptions,
    record: dict[str, Any] | None,
    training: dict[str, Any],
    folder: Path,
) -> str:
    from huggingface_hub import ModelCardData

    title = repo_id.split("/")[-1]
    config, tokenizer = pipe.model.config, json.loads((folder / "tokenizer" / "config.json").read_text())
    kind = "class-conditional" if config.num_classes else "unlabelled"
    task = "unconditional-image-generation"  # the Hub has no task for classes; its nearest
    data = ModelCardData(
        library_name="ecar", pipeline_tag=task, license=card.license, datasets=list(card.datasets) or None,
        tags=["image-generation", "flow-matching", "e-car", kind],
        model_name=title, eval_results=_results(record, task) if record else None,
    )  # fmt: skip
    names = ", ".join(config.class_names[:20]) + (", ..." if len(config.class_names) > 20 else "")
    classes = f" in {config.num_classes} classes: {names}" if config.num_classes else ""
    height, width = config.image_side or (0, 0)
    licence = tokenizer.get("license") or "not stated in it"
    lines = [
        "---", data.to_yaml(), "---", "", f"# {title}", "", "![Samples](samples.png)", "",
        f"Images of {height}x{width} pixels{classes}. "
        f"{pipe.model.num_parameters():,} parameters, {len(pipe.model.plan)} stages.", "",
        "```python", "from ecar import Pipeline", "", f'pipe = Pipeline.from_pretrained("{repo_id}")',
        "pipe(seeds=[0, 1]).images[0].save('image.png')", "```", "",
        f"Tokenizer: {tokenizer['kind']}, fingerprint {pipe.tokenizer.fingerprint()}; its licence: {licence}. "
        f"Licence of the weights: {card.license or 'not stated'}.", "",
    ]  # fmt: skip
    if record is not None:
        metrics = record["metrics"]
        lines += ["## Metrics", "", "| figure | value |", "|---|---|"]
        lines += [f"| {k} | {v} |" for k, v in metrics.items() if k not in _NOT_METRICS]
        lines += ["", f"N = {metrics['num']}, extractor {record['extractor']['name']}, guidance "
                  f"{record['settings']['guidance']}, steps {record['settings']['steps']}, against "
                  f"{metrics['against']} images of {Path(record['reference']['name']).name}; "
                  f"ecar {record.get('ecar')}, commit {record.get('commit')}:",
                  "", f"    {_command(record)}", ""]  # fmt: skip
        if metrics.get("biased_small_sample"):
            lines += ["N is no larger than the number of features: the Frechet distance is mostly bias.", ""]
    if training:
        lines += ["## Training", "", "```json", json.dumps(training, indent=1), "```", ""]
    return "\n".join(lines)
