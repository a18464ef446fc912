"""The block-causal stage transformer."""

from ecar.transformer.cache import StageCache
from ecar.transformer.model import StageTransformer

__all__ = ["StageCache", "StageTransformer"]
