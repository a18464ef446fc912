"""A model's quality beside its cost: what ``ecar evaluate`` writes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecar.config import SamplingConfig
from ecar.cost.flops import sampling_flops
from ecar.evaluation.config import EvaluationConfig
from ecar.evaluation.run import evaluate
from ecar.pretrained.folders import how_trained, resolve_model
from ecar.processes.world import World
from ecar.refine import BestOf, identity
from ecar.sampling.pipeline import Pipeline

_ALONE = World()


def evaluate_model(
    pipe: Pipeline,
    config: EvaluationConfig,
    out: Path,
    *,
    settings: SamplingConfig,
    best: BestOf | None = None,
    plain: Pipeline | None = None,
    how: Mapping[str, object] | None = None,
    device: str = "auto",
    world: World = _ALONE,
) -> dict[str, Any]:
    """``evaluate`` a model that was loaded by its name, with the FLOPs of an image.

    Args:
        pipe: draws.
        config: what is compared, and how.
        out: the record's file; samples go to the folder of that name + .samples.
        settings: how it samples.
        best: chooses among candidates.
        plain: the same model as it is before it is compiled, where ``pipe`` is: it can be counted.
        how: the model is computed, for the record.
        device: of the extractor.
        world: processes that sample together.

    Returns:
        The record on rank 0, else nothing.
    """
    plain, about = plain or pipe, dict[str, object]()
    if not world.rank:
        about = {"model": pipe.name, "parameters": plain.model.num_parameters(), **(how or {}), **identity(pipe, best)}
    record = evaluate(
        pipe, config, settings=settings, sampler=best, about=about, folder=out.with_suffix(".samples"),
        picture=out.with_suffix(".closest.png"), device=device, world=world,
    )  # fmt: skip
    if world.rank:
        return {}
    critic = None if best is None else best.critic
    flops = sampling_flops(plain, settings, record["candidates_drawn"], critic)
    ema = how_trained(resolve_model(pipe.name)).get("ema")  # whose decay the averaged weights have
    return record | {"flops_per_image": flops, "ema": ema}
