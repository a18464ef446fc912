"""``ecar critic``: what chooses among candidates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ecar.cli.flags import Model, ModelFlags, SamplingFlags
from ecar.cli.options import output_file, parse
from ecar.data.reading import ReadOptions


@dataclass(frozen=True, kw_only=True)
class CriticOptions(ReadOptions):
    """Learn to tell a model's samples from real images, to choose among candidates: better images at more cost. Put the
    file into the model's folder as critic.safetensors, and give --candidates to ecar sample and ecar evaluate."""

    model: Model
    """Folder, bundled name or Hub id."""
    data: str
    """Real images, those that the model was trained on: image folder, WebDataset tars, parquet or Hub data set."""
    out: str = "critic.safetensors"
    """File to write (.safetensors)."""
    num: int = 25_000
    """Samples to draw, and real images to take, at most (at random); in the same shares of classes."""
    power: float = 2.0
    """Exponent of the ratio of likelihoods by which candidates are chosen: 1 is right for very many candidates."""
    seed: int = 1_000_000_000
    """Seed of the first sample; far from those that are drawn later."""
    batch_size: int = 250
    """Samples computed at once."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    """How the model is sampled, here and later."""
    compute: ModelFlags = field(default_factory=ModelFlags)
    """How the model is computed."""


OPTIONS = CriticOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, check, draw samples, fit, write; prints one JSON object as the last line."""
    options = parse(CriticOptions, arguments, "critic")
    out = output_file(options.out, (".safetensors",))
    from ecar.refine import make_critic

    pipe = options.compute.usable().load(options.model)
    critic = make_critic(
        pipe, options.data, settings=options.sampling.settings(pipe), num=options.num, power=options.power,
        seed=options.seed, batch_size=options.batch_size, read=options.reading(),
    )  # fmt: skip
    critic.save(out)
    print(json.dumps({"critic": str(out), **critic.about}))
