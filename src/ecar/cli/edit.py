"""``ecar edit``: draw parts of a picture anew, variations, another class, margins, finer detail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ecar.cli.flags import AdaptedModelFlags, EditFlags, SamplingFlags
from ecar.cli.options import flat, parse
from ecar.cli.pictures import EditedFlags


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """Edit a picture: a part of it (--mask, --box), all of it (--strength), around it (--expand) or finer (--upscale).

    Takes a picture, and before it, if you like, a model: bundled name, folder or Hub id; default: butterflies.
    """

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL] IMAGE")]
    """The model, and the picture."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class of what is drawn, name or id; default: no class."""
    kind: EditFlags = field(default_factory=EditFlags)
    """What is drawn anew."""
    count: int = 1
    """Results, side by side; result i has seed + i."""
    seed: int = 0
    """Seed of the first result."""
    files: EditedFlags = field(default_factory=EditedFlags)
    """Files to write."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    """How the model is sampled."""
    compute: AdaptedModelFlags = field(default_factory=AdaptedModelFlags)
    """How the model is computed."""

    def __post_init__(self) -> None:
        if len(self.words) not in (1, 2):
            raise ValueError(f"ecar edit takes [MODEL] IMAGE, got {' '.join(self.words) or 'nothing'}")
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")


OPTIONS = EditOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, check every path, edit, write; prints one JSON object as the last line."""
    options = parse(EditOptions, arguments, "edit")
    from ecar.files.images import read_image

    *named, file = options.words
    model, picture, compute = "".join(named) or "butterflies", read_image(file), options.compute.usable()
    pipe, seeds = compute.load(model), range(options.seed, options.seed + options.count)
    method, given = options.kind.call
    output = getattr(pipe, method)(
        picture, label=options.class_, seeds=seeds, settings=options.kind.settings(options.sampling, pipe),
        return_stages=options.files.of_stages, **given,
    )  # fmt: skip
    record = options.files.write(output, model, {"image": file, "mask": options.kind.mask}, {
        "class": options.class_, "count": options.count, "seed": options.seed, **flat(options.kind), **flat(compute),
    })  # fmt: skip
    print(record)
