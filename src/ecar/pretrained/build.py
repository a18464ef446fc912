"""Networks by kind."""

from __future__ import annotations

from collections.abc import Callable

from ecar.baselines.dit import DiT
from ecar.config import ModelConfig
from ecar.network.model import ECAR, StageModel

KINDS: dict[str, Callable[[ModelConfig], StageModel]] = {"ecar": ECAR, "dit": DiT}


def build_model(config: ModelConfig) -> StageModel:
    """The network that ``config.kind`` names, with fresh weights."""
    return KINDS[config.kind](config)
