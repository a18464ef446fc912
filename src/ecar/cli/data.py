"""``ecar data check``: what is wrong with the images of a data set, or with the shards of a latent cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ecar.cli.options import output_file, parse
from ecar.config import image_side
from ecar.data.reading import ReadOptions

_SHOWN, _LISTED = 5, 20


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ReadOptions):
    """List images that are broken, tiny, duplicate, nearly blank, animated, transparent or of odd pixel formats; or the
    damaged shards of a latent cache. The exit code is 1 where some are broken."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images, WebDataset tars, parquet file or folder, Hub data set id, or folder of ecar encode."""
    resolution: tuple[int, ...] = (32,)
    """Images smaller than this side (or height and width) are tiny."""
    max_images: int | None = None
    """Look at this many images only, chosen at random."""
    out: str | None = None
    """Also write every finding (.json)."""


OPTIONS = CheckOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, look at every image, print a summary."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ecar data check DATA [options]      (ecar data check --help lists the options)")
        return
    action, *rest = arguments
    if action != "check":
        raise ValueError(f"ecar data knows check, not {action!r}")
    options = parse(CheckOptions, rest, "data check")
    side = image_side(options.resolution)
    out = output_file(options.out, (".json",)) if options.out else None
    from ecar.data.check import BROKEN, check_images
    from ecar.data.shards import check_cache, is_cache
    from ecar.data.source import load_source

    if is_cache(options.data):
        options.check_unused(options.data, "a latent cache")
        record = check_cache(options.data)
        if out is not None:
            out.write_text(json.dumps(record, indent=1) + "\n")
        for line in record["damaged"]:
            print(f"{BROKEN}: {line}")
        print(json.dumps(record))
        if record["damaged"]:
            sys.exit(1)
        return
    source = load_source(options.data, options.reading(), max_images=options.max_images)
    report = check_images(source, *side)
    record = {
        "data": options.data,
        **source.about(),
        "empty_classes": source.empty_classes,
        "sides": {f"{w}x{h}": count for (w, h), count in report.sides.most_common(20)},
    }
    if out is not None:  # first: what is printed may break off
        every = {"left_out": source.left_out, "findings": report.findings}
        out.write_text(json.dumps({**record, **every}, indent=1) + "\n")
    for kind, found in report.findings.items():
        print(f"{kind}: {len(found)}")
        for line in found[:_SHOWN]:
            print(f"    {line}")
        if len(found) > _SHOWN:
            print(f"    ... and {len(found) - _SHOWN} more")
    record["left_out"] = {
        reason: {"count": len(names), "names": names[:_LISTED]} for reason, names in source.left_out.items()
    }
    record["findings"] = {kind: len(found) for kind, found in report.findings.items()}
    print(json.dumps(record))
    if BROKEN in report.findings:
        sys.exit(1)
