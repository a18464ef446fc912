"""The model card: what the Hub shows of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecar.config import CardOptions

if TYPE_CHECKING:
    from ecar.sampling.pipeline import Pipeline

_NOT_METRICS = {"num", "against", "biased_small_sample"}


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


def card_text(
    pipe: Pipeline,
    repo_id: str,
    card: CardOptions,
    record: dict[str, Any] | None,
    training: dict[str, Any],
) -> str:
    """The text of ``README.md``.

    Args:
        pipe: the model.
        repo_id: OWNER/NAME.
        card: what the user says of it.
        record: of an `ecar evaluate` of these weights.
        training: options of the run that made it.
    """
    from huggingface_hub import ModelCardData

    title = repo_id.split("/")[-1]
    config = pipe.model.config
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
    lines = [
        "---", data.to_yaml(), "---", "", f"# {title}", "", "![Samples](samples.png)", "",
        f"Images of {height}x{width} pixels{classes}. "
        f"{pipe.model.num_parameters():,} parameters, {len(pipe.model.plan)} stages.", "",
        *_how_to_load(repo_id, config.class_names),
        f"Tokenizer: {pipe.tokenizer.kind}, fingerprint {pipe.tokenizer.fingerprint()}. "
        f"Licence of the weights: {card.license or 'not stated'}.", "",
    ]  # fmt: skip
    if record is not None:
        lines += _metrics(record)
    if training:
        lines += ["## Training", "", "```json", json.dumps(training, indent=1), "```", ""]
    return "\n".join(lines)


def _how_to_load(repo_id: str, class_names: tuple[str, ...]) -> list[str]:
    labels = f"labels=[{class_names[0]!r}, {class_names[-1]!r}], " if class_names else ""
    return [
        "```python", "from ecar import Pipeline", "", f'pipe = Pipeline.from_pretrained("{repo_id}")',
        f"pipe({labels}seeds=[0, 1]).images[0].save('image.png')", "```", "",
        "The same pictures through diffusers, which runs the `pipeline.py` of this repository; `ecar` has to be "
        "installed:", "",
        "```python", "from diffusers import DiffusionPipeline", "",
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)',
        f"pipe({labels.replace('labels', 'class_labels')}seeds=[0, 1]).images[0].save('image.png')", "```", "",
    ]  # fmt: skip


def _metrics(record: dict[str, Any]) -> list[str]:
    metrics = record["metrics"]
    lines = ["## Metrics", "", "| figure | value |", "|---|---|"]
    lines += [f"| {k} | {v} |" for k, v in metrics.items() if k not in _NOT_METRICS]
    lines += ["", f"N = {metrics['num']}, extractor {record['extractor']['name']}, guidance "
              f"{record['settings']['guidance']}, steps {record['settings']['steps']}, against "
              f"{metrics['against']} images of {Path(record['reference']['name']).name}; "
              f"ecar {record.get('ecar')}, commit {record.get('commit')}:",
              "", f"    {_command(record)}", ""]  # fmt: skip
    if metrics.get("biased_small_sample"):
        lines += ["N is no larger than the number of features: the Frechet distance is mostly bias.", ""]
    return lines
