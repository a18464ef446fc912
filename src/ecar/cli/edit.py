"""``ecar edit``: draw parts of a picture anew, variations, another class, margins, finer detail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from ecar.cli.flags import AdaptedModelFlags, SamplingFlags
from ecar.cli.options import output_file, parse

_TOLD_OTHERWISE = ("words", "class_", "sampling", "compute")


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """Edit a picture: a part of it (--mask, --box), all of it (--strength), around it (--expand) or finer (--upscale).

    Takes a picture, and before it, if you like, a model: bundled name, folder or Hub id; default: butterflies.
    """

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL] IMAGE")]
    """The model, and the picture."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class of what is drawn, name or id; default: no class."""
    mask: str | None = None
    """Picture of the same size: its transparent pixels are drawn or, where it has none, its white ones."""
    box: tuple[int, ...] = ()
    """X,Y,W,H: draw this box, in pixels of the picture."""
    strength: float = 1.0
    """Above 0, at most 1: how much is drawn anew; small values change details only."""
    expand: tuple[int, ...] = ()
    """L,T,R,B: draw margins, in pixels of the picture, which is scaled down for them."""
    upscale: int | None = None
    """2 or 4: draw the finer stages of a picture that is so many times smaller than the model's."""
    count: int = 1
    """Results, side by side; result i has seed + i."""
    seed: int = 0
    """Seed of the first result."""
    out: str = "edited.png"
    """File to write (.png)."""
    stages: str | None = None
    """Also write a strip of the stages (.png)."""
    gif: str | None = None
    """Also write the results growing stage by stage (.gif)."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    """How the model is sampled."""
    compute: AdaptedModelFlags = field(default_factory=AdaptedModelFlags)
    """How the model is computed."""

    def __post_init__(self) -> None:
        if len(self.words) not in (1, 2):
            raise ValueError(f"ecar edit takes [MODEL] IMAGE, got {' '.join(self.words) or 'nothing'}")
        asked = [f"--{name}" for name in ("mask", "box", "expand", "upscale") if getattr(self, name)]
        asked += ["--strength"] * (self.strength != 1 and bool({"--expand", "--upscale"} & {*asked}))
        if len(asked) > 1:
            raise ValueError(f"{asked[0]} and {asked[1]} do not go together: leave one out")
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")

    @property
    def kind(self) -> tuple[str, dict[str, Any]]:
        """Method of ``Pipeline`` and its arguments."""
        if self.expand:
            names = ("left", "top", "right", "bottom")
            if len(self.expand) != 4:
                raise ValueError(f"--expand takes four numbers ({', '.join(names)}), got {len(self.expand)}")
            return "expand", dict(zip(names, self.expand, strict=True))
        if self.upscale is not None:
            return "upscale", {"factor": self.upscale}
        return "edit", {"mask": self.mask or self.box or None, "strength": self.strength}


OPTIONS = EditOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, check every path, edit, write; prints one JSON object as the last line."""
    options = parse(EditOptions, arguments, "edit")
    out, (method, given) = output_file(options.out, (".png",)), options.kind
    sheet = output_file(options.stages, (".png",), "--stages") if options.stages else None
    gif = output_file(options.gif, (".gif",), "--gif") if options.gif else None
    from ecar import __version__
    from ecar.files.images import read_image
    from ecar.pretrained.folders import weights_fingerprint
    from ecar.sampling.pictures import grid, save_gif, save_png, strip

    *named, file = options.words
    model, picture, compute = "".join(named) or "butterflies", read_image(file), options.compute.usable()
    pipe, seeds = compute.load(model), range(options.seed, options.seed + options.count)
    output = getattr(pipe, method)(
        picture, label=options.class_, seeds=seeds, settings=options.sampling.settings(pipe),
        return_stages=bool(sheet or gif), **given,
    )  # fmt: skip
    record: dict[str, object] = {
        "model": model,
        "weights": weights_fingerprint(model),
        "ecar": __version__,
        "image": file,
    }
    record |= {"image_sha256": _digest(file), "mask_sha256": _digest(options.mask), "class": options.class_}
    told = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in _TOLD_OTHERWISE}
    text = json.dumps(record | told | asdict(compute) | {"settings": output.settings.to_json()})
    save_png(grid(output.images), out, {"ecar": text})
    if sheet:
        save_png(strip(output.stages), sheet, {"ecar": text})
    if gif:
        save_gif(output.stages, gif, None)
    print(text)


def _digest(file: str | None) -> str | None:
    return None if file is None else hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
