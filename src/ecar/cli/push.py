"""``ecar push``: publish a model on the Hub, or write the folder that would be uploaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ecar.cli.flags import Model
from ecar.cli.options import parse
from ecar.config import CardOptions


@dataclass(frozen=True, kw_only=True)
class PushOptions(CardOptions):
    """Publish a model with its card."""

    model: Model
    """Folder (such as RUN/final), bundled name or Hub id."""
    repo_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Where to: OWNER/NAME."""
    private: bool = False
    """Make a new repository private."""
    dry_run: bool = False
    """Upload nothing: write the folder that would be uploaded, to --out."""
    out: str | None = None
    """Folder of --dry-run; default: NAME in the working directory."""


OPTIONS = PushOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, check, write or upload; prints one JSON object as the last line."""
    options = parse(PushOptions, arguments, "push")
    if options.out is not None and not options.dry_run:
        raise ValueError("--out goes with --dry-run: an upload keeps no folder")
    from ecar import Pipeline
    from ecar.files.remote import check_repo_id
    from ecar.hub import push, write_folder
    from ecar.pretrained.folders import resolve_model

    check_repo_id(options.repo_id)
    source = resolve_model(options.model)
    pipe = Pipeline.from_pretrained(source, device="cpu")
    if options.dry_run:
        folder = Path(options.out or options.repo_id.split("/")[-1]).expanduser()
        write_folder(pipe, folder, options.repo_id, options, source)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        print(json.dumps({"repo_id": options.repo_id, "folder": str(folder), "files": files}))
        return
    commit = push(pipe, options.repo_id, options, private=options.private, source=source)
    print(json.dumps({"repo_id": options.repo_id, "commit": commit}))
