"""``ecar info``: what a model is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ecar.cli.flags import ModelOrDefault
from ecar.cli.options import parse
from ecar.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Describe a model."""

    model: ModelOrDefault = "butterflies"
    """Bundled name, folder or Hub id."""


OPTIONS = InfoOptions


def run(arguments: Sequence[str]) -> None:
    """Load the model (which checks it) and print its facts, and all of them as one JSON object in the last line."""
    options = parse(InfoOptions, arguments, "info")
    from ecar.pretrained.folders import critic_file, load_model, resolve_model, weights_fingerprint

    folder = resolve_model(options.model)
    model, tokenizer = load_model(folder)
    config, parts = model.config, {"trunk": model.trunk, "head": model.head}
    parameters = {f"{name}_parameters": sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    record = {
        "model": options.model, "folder": str(folder), "weights": weights_fingerprint(folder),
        "parameters": model.num_parameters(), **parameters,
        "stages": [{"side": s.side, "from": round(s.start, 4), "to": s.end, "tokens": s.tokens} for s in model.plan],
        "tokenizer": {"kind": tokenizer.kind, **tokenizer.config(), "fingerprint": tokenizer.fingerprint()},
        "critic": critic_file(folder) is not None, "config": config.to_json(),
    }  # fmt: skip
    height, width = config.image_side
    sides = ", ".join(f"{h}x{w}" for h, w in (s.side for s in model.plan))
    facts = {
        "folder": folder,
        "weights": record["weights"],
        "images": f"{height}x{width} pixels",
        "classes": f"{config.num_classes}: {', '.join(config.class_names[:10])}" if config.num_classes else "none",
        "parameters": f"{model.num_parameters():,} ({', '.join(f'{n} {c:,}' for n, c in _short(parameters))})",
        "stages": f"{len(model.plan)}, maps of {sides}",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.channels} channels",
        "sampling": _sampling(config.sampling),
        "critic": "yes (--candidates)" if record["critic"] else "none",
    }
    print(f"{options.model}: a model of kind {config.kind}")
    for name, fact in facts.items():
        print(f"  {name:11} {fact}")
    print(json.dumps(record))


def _short(parameters: dict[str, int]) -> list[tuple[str, int]]:
    return [(name.removesuffix("_parameters"), count) for name, count in parameters.items()]


def _sampling(settings: SamplingConfig | None) -> str:
    if settings is None:
        return "no settings of its own"
    fixed = ", distilled for these steps" if settings.fixed_steps else ""
    return f"{settings.solver} steps {settings.steps}, guidance {settings.guidance}{fixed}"
