"""A model's quality beside its cost: what ``ecar evaluate`` writes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecar.cost.flops import sampling_flops
from ecar.evaluation import evaluate
from ecar.evaluation.config import EvaluationConfig
from ecar.pretrained.adapters import adapter_fingerprint
from ecar.pretrained.folders import how_trained, resolve_model, weights_fingerprint
from ecar.processes.world import World
from ecar.refine import BestOf
from ecar.sampling.pipeline import Pipeline

_ALONE = World()


def evaluate_model(
    model: str,
    pipe: Pipeline,
    config: EvaluationConfig,
    out: Path,
    *,
    best: BestOf | None = None,
    plain: Pipeline | None = None,
    how: Mapping[str, object] | None = None,
    world: World = _ALONE,
    **options: Any,
) -> dict[str, Any]:
    """``evaluate`` a model by its name, with the FLOPs of an image.

    Args:
        model: bundled name, folder or Hub id that ``pipe`` was loaded from.
        pipe: draws.
        config: what is compared, and how.
        out: the record's file; samples go to the folder of that name + .samples.
        best: chooses among candidates.
        plain: the same model as it is before it is compiled, where ``pipe`` is: it can be counted.
        how: the model is computed, for the record.
        world: processes that sample together.
        options: of ``evaluate``: settings, device.

    Returns:
        The record on rank 0, else nothing.
    """
    plain, critic = plain or pipe, None if best is None else best.critic
    about: dict[str, object] = {}
    if not world.rank:
        about = {
            "model": model,
            "weights": weights_fingerprint(model),
            "parameters": plain.model.num_parameters(),
            **(how or {}),
            "adapter": None if pipe.adapter is None else adapter_fingerprint(pipe.adapter),
            "candidates": None if best is None else best.candidates,
            "acceptance": None if best is None else best.acceptance,
            "critic": None if critic is None else critic.fingerprint,
        }
    record = evaluate(
        pipe, config, sampler=best, about=about, folder=out.with_suffix(".samples"),
        picture=out.with_suffix(".closest.png"), world=world, **options,
    )  # fmt: skip
    if world.rank:
        return {}
    settings = options.get("settings") or pipe.settings()
    flops = sampling_flops(plain, settings, record["candidates_drawn"], critic)
    ema = how_trained(resolve_model(model)).get("ema")  # whose decay the averaged weights have
    return record | {"flops_per_image": flops, "ema": ema}
