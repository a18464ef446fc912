"""``ecar evaluate``: how good a model's samples are, against real images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecar.cli.flags import AdaptedModelFlags, CandidateFlags, SamplingFlags
from ecar.cli.options import changed, flat, output_file, parse
from ecar.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from ecar.processes.world import World


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Judge a model, or a file of samples, against real images."""

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
            raise ValueError(f"--samples are judged as they are: {', '.join(given)} would change nothing; leave it out")


OPTIONS = EvaluateOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, check, sample or read, measure, write; prints one JSON object as the last line. Under torchrun the
    processes sample together, and the first one does the rest."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    out = output_file(options.out, (".json",))
    if options.samples is not None:
        record = _samples_record(options, options.samples, out)
    else:
        from ecar.devices import resolve_device
        from ecar.processes.signals import StopRequest, exit_when_stopped
        from ecar.processes.world import World

        device = resolve_device(options.compute.device)
        with exit_when_stopped(), StopRequest("while evaluating, finished batches stay"):
            world = World.start(device, tensors=False)
            compute = replace(options.compute, device=world.local_device(device)).usable()
            record = _model_record(options, compute, str(options.model), out, world)
            world.stop()
        if world.rank:
            return
    record = {"command": flat(options), **record}
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def _samples_record(options: EvaluateOptions, file: str, out: Path) -> dict[str, Any]:
    from ecar.evaluation import evaluate
    from ecar.evaluation.samples import read_samples

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--samples are judged by one process: leave torchrun out")
    samples = read_samples(Path(file).expanduser())
    record = evaluate(
        samples, options.comparison, picture=out.with_suffix(".closest.png"), device=options.compute.device
    )
    record["samples"]["file"] = file
    return record


def _model_record(
    options: EvaluateOptions, compute: AdaptedModelFlags, model: str, out: Path, world: World
) -> dict[str, Any]:
    from ecar.cost.quality import evaluate_model

    pipe = world.first_then_others(lambda: compute.load(model))
    fast = compute.compile or compute.cuda_graphs
    how = {name: getattr(compute, name) for name in ("dtype", "compile", "cuda_graphs", "decoder")}
    return evaluate_model(
        model, pipe, options.comparison, out, settings=options.sampling.settings(pipe),
        best=options.selection.best_of(pipe), plain=compute.load_plain(model) if fast and not world.rank else None,
        how=how, device=compute.device, world=world,
    )  # fmt: skip
