"""``ecar evaluate``: how good a model's samples are, against real images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ecar.cli.flags import AdaptedModelFlags, CandidateFlags, SamplingFlags, together
from ecar.cli.options import changed, flat, output_file, parse
from ecar.evaluation.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Compare a model, or a file of samples, with real images."""

    model: str | None = None
    """Bundled name, folder or Hub id to sample from."""
    samples: str | None = None
    """Or samples to read: folder of pictures (subfolders are classes), .npy, or .npz with arr_0 and labels (ADM)."""
    out: str = "eval.json"
    """File to write (.json). Samples go to the folder of that name + .samples, from which the command resumes."""
    comparison: EvaluationConfig
    """What is compared, and how."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    """How the model is sampled."""
    selection: CandidateFlags = field(default_factory=CandidateFlags)
    """Choosing among candidates."""
    compute: AdaptedModelFlags = field(default_factory=AdaptedModelFlags)
    """How the model is computed."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.samples is None):
            raise ValueError("give --model or --samples, one of them")
        seed = ["--seed"] if self.comparison.seed else []
        given = changed(self.sampling, self.selection, replace(self.compute, device="auto")) + seed
        if self.samples is not None and given:
            raise ValueError(f"--samples are compared as they are: leave {', '.join(given)} out")


OPTIONS = EvaluateOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, check, sample or read, measure, write; prints one JSON object as the last line. Under torchrun the
    processes sample together, and the first one does the rest."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    out = output_file(options.out, (".json",))
    record = _samples_record(options, out) if options.samples is not None else _model_record(options, out)
    if record:  # else the first process has it
        record = {"command": flat(options), **record}
        out.write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record))


def _samples_record(options: EvaluateOptions, out: Path) -> dict[str, Any]:
    from ecar.evaluation.run import evaluate
    from ecar.evaluation.samples import read_samples

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--samples are compared by one process: leave torchrun out")
    samples = read_samples(Path(str(options.samples)).expanduser())
    picture, device = out.with_suffix(".closest.png"), options.compute.device
    record = evaluate(samples, options.comparison, picture=picture, device=device)
    record["samples"]["file"] = options.samples
    return record


def _model_record(options: EvaluateOptions, out: Path) -> dict[str, Any]:
    """With the FLOPs of an image; nothing where another process has it."""
    from ecar.cost.flops import sampling_flops
    from ecar.evaluation.run import evaluate
    from ecar.pretrained.folders import how_trained, resolve_model
    from ecar.refine import identity

    model = str(options.model)
    with together(options.compute.device, "while evaluating, finished batches stay") as (world, device):
        compute = replace(options.compute, device=device).usable()
        pipe = plain = world.first_then_others(lambda: compute.load(model))
        settings, best, about = options.sampling.settings(pipe), options.selection.best_of(pipe), dict[str, object]()
        if world.rank == 0:
            if compute.compile or compute.cuda_graphs:
                plain = compute.load_plain(model)  # the other one cannot be counted
            how = {name: getattr(compute, name) for name in ("dtype", "compile", "cuda_graphs", "decoder")}
            about = {"model": model, "parameters": plain.model.num_parameters(), **how, **identity(pipe, best)}
        record = evaluate(
            pipe, options.comparison, settings=settings, sampler=best, about=about, folder=out.with_suffix(".samples"),
            picture=out.with_suffix(".closest.png"), device=compute.device, world=world,
        )  # fmt: skip
        if world.rank:
            return {}
        critic = None if best is None else best.critic
        flops = sampling_flops(plain, settings, record["candidates_drawn"], critic)
        ema = how_trained(resolve_model(model)).get("ema")  # whose decay the averaged weights have
        return record | {"flops_per_image": flops, "ema": ema}
