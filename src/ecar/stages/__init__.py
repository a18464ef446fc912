"""Stages: plan, resizing, noise, path and jump (Eq. 1-5)."""

from ecar.config import start_level
from ecar.stages.path import (
    PathSample,
    data_from_end,
    end_point,
    fresh_part,
    interpolate,
    jump,
    noise_of_stage,
    noises,
    start_point,
    velocity_std,
)
from ecar.stages.plan import Stage, make_plan
from ecar.stages.resize import down, low_band, pyramid, to_map, to_tokens, up

__all__ = [
    "PathSample",
    "Stage",
    "data_from_end",
    "down",
    "end_point",
    "fresh_part",
    "interpolate",
    "jump",
    "low_band",
    "make_plan",
    "noise_of_stage",
    "noises",
    "pyramid",
    "start_level",
    "start_point",
    "to_map",
    "to_tokens",
    "up",
    "velocity_std",
]
