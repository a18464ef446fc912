"""``ecar info``: what a model is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ecar.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Describe a model."""

    model: Annotated[str, tyro.conf.Positional] = "fashion"
    """Bundled name, folder or Hub id."""


def run(arguments: Sequence[str]) -> None:
    """Load the model (which checks it) and print its configuration as JSON."""
    options = parse(InfoOptions, arguments, "info")
    from ecar.pretrained.folders import critic_file, load_model, resolve_model

    folder = resolve_model(options.model)
    model, tokenizer = load_model(folder)
    stages = [{"side": s.side, "from": round(s.start, 4), "to": s.end, "tokens": s.tokens} for s in model.plan]
    record = {
        "model": options.model,
        "folder": str(folder),
        "parameters": model.num_parameters(),
        "trunk_parameters": sum(p.numel() for p in model.trunk.parameters()),
        "head_parameters": sum(p.numel() for p in model.head.parameters()),
        "stages": stages,
        "tokenizer": {"kind": tokenizer.kind, **tokenizer.config(), "fingerprint": tokenizer.fingerprint()},
        "critic": critic_file(folder) is not None,
        "config": model.config.to_json(),
    }
    print(json.dumps(record, indent=2))
