"""ecar: fast image generation with continuous autoregressive models (E-CAR, arXiv 2412.14170)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecar.sampling.pipeline import Pipeline as Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed: ``ecar --help`` must answer at once."""
    if name == "Pipeline":
        from ecar.sampling.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'ecar' has no attribute {name!r}")
