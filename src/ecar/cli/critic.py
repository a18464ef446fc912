"""``ecar critic``: what chooses among candidates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import tyro

from ecar.cli.options import check_dtype, one_or_all, output_file, parse, torch_dtype, usable_dtype
from ecar.data.reading import ReadOptions

if TYPE_CHECKING:
    import torch

    from ecar import Pipeline
    from ecar.config import SamplingConfig
    from ecar.refine import Fit
    from ecar.refine.critic import Features


@dataclass(frozen=True, kw_only=True)
class CriticOptions(ReadOptions):
    """Learn to tell a model's samples from real images. With the file as critic.safetensors in the model's folder,
    ecar sample and ecar evaluate draw --candidates of each image, and it chooses: better images at more cost."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, bundled name or Hub id."""
    data: str
    """Real images, those that the model was trained on: image folder, WebDataset tars, parquet or Hub data set."""
    out: str = "critic.safetensors"
    """File to write (.safetensors)."""
    num: int = 25_000
    """Samples to draw, and real images to take, at most (at random); in the same shares of classes."""
    power: float = 2.0
    """Exponent of the ratio of likelihoods by which candidates are chosen: 1 is right for very many candidates."""
    steps: tuple[int, ...] | None = None
    """Solver steps per stage; default: the model's."""
    guidance: tuple[float, ...] | None = None
    """Guidance scale, one number or one per stage; default: the model's."""
    solver: str | None = None
    """euler, heun or ab2; default: the model's."""
    guidance_from: tuple[float, ...] | None = None
    """Time of a stage, in [0, 1), from which guidance acts, one number or one per stage; default: the model's."""
    seed: int = 1_000_000_000
    """Seed of the first sample; far from those that are drawn later."""
    batch_size: int = 250
    """Samples computed at once."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    compile: bool = False
    """Compile the model first (a minute; on CPU it needs g++)."""


def run(arguments: Sequence[str]) -> None:
    """Parse, check, draw samples, fit, write; prints one JSON object as the last line."""
    options = parse(CriticOptions, arguments, "critic")
    out = output_file(options.out, (".safetensors",))
    check_dtype(options.dtype)
    if options.num < 100 or options.batch_size < 1:
        raise ValueError("--num must be at least 100 and --batch-size at least 1")
    if not 0 < options.power <= 10:
        raise ValueError(f"--power must be above 0 and at most 10, got {options.power}")
    from ecar import Pipeline, __version__
    from ecar.pretrained.folders import weights_fingerprint
    from ecar.refine.critic import Critic, Features
    from ecar.sampling.noise import MAX_SEED

    if not 0 <= options.seed <= MAX_SEED - options.num + 1:
        raise ValueError(f"--seed must be in 0..{MAX_SEED - options.num + 1} with --num {options.num}")
    features = Features()  # first: it may be missing
    options = replace(options, dtype=usable_dtype(options.dtype, options.device))
    how = {"device": options.device, "dtype": torch_dtype(options.dtype), "compile": options.compile}
    pipe = Pipeline.from_pretrained(options.model, **how)  # type: ignore[arg-type]
    steps, guidance, start = (one_or_all(v) for v in (options.steps, options.guidance, options.guidance_from))
    settings = pipe.settings(steps, guidance, options.solver, start)  # type: ignore[arg-type]
    features = features.to(pipe.model.device)
    fit, count = _fit(options, pipe, settings, features)
    about = {
        "model": options.model if "/" not in options.model else "",  # else a place on some machine
        "weights": weights_fingerprint(options.model),
        "settings": settings.to_json(),
        "power": options.power,
        "images": count,
        "accuracy": round(fit.accuracy, 4),
        "seed": options.seed,
        "ecar": __version__,
    }
    Critic(features, fit.tensors, about).save(out)
    print(json.dumps({"critic": str(out), **about}))


def _fit(options: CriticOptions, pipe: Pipeline, settings: SamplingConfig, features: Features) -> tuple[Fit, int]:
    """The critic, and the number of images on each side."""
    import torch

    from ecar.evaluation.reference import read_images
    from ecar.refine import fit_critic

    config = pipe.model.config
    images, labels, names = read_images(options.data, options.reading(), *config.image_side, None)
    if config.num_classes:
        from ecar.evaluation.evaluate import check_classes

        check_classes(config, options.data, names)
    else:
        labels = torch.zeros_like(labels)
    if len(images) < 100:
        raise ValueError(f"--data {options.data} has {len(images)} images; a critic needs 100 at least")
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))[: options.num]
    labels = labels[rows]
    real = torch.cat([features(images[some]).cpu() for some in rows.split(options.batch_size)])
    del images  # before others are drawn
    drawn = _samples(options, pipe, settings, labels, features)
    return fit_critic(real, labels, drawn, labels, config.num_classes), len(rows)


def _samples(
    options: CriticOptions, pipe: Pipeline, settings: SamplingConfig, labels: torch.Tensor, features: Features
) -> torch.Tensor:
    """Features of a sample for each label."""
    import torch
    from tqdm.auto import tqdm

    from ecar.sampling.pictures import from_pil

    parts = []
    for first in tqdm(range(0, len(labels), options.batch_size), desc="sampling", disable=None):
        some = labels[first : first + options.batch_size].tolist()
        seeds = range(options.seed + first, options.seed + first + len(some))
        out = pipe(
            some if pipe.model.config.num_classes else None, seeds=seeds, steps=settings.steps,
            guidance=settings.guidance, solver=settings.solver, guidance_from=settings.guidance_from,
            batch_size=options.batch_size,
        )  # fmt: skip
        parts.append(features(from_pil(out.images)).cpu())
    return torch.cat(parts)
