"""How good samples are: extractors, distances between feature sets, and the files they are read from."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ecar.evaluation.run import evaluate as evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> object:
    """Loaded on first use: the configuration needs no torch."""
    if name == "evaluate":
        from ecar.evaluation.run import evaluate

        return evaluate
    raise AttributeError(f"module 'ecar.evaluation' has no attribute {name!r}")
