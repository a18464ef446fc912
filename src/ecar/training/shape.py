"""Options of the model and its stages, and the same without anything left open."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecar.config import CONTEXT_NOISE, HAND_OVER, MODEL_KINDS, RHO, ModelConfig, Side
from ecar.files.options import option

_SIZES = ("width", "heads", "trunk_depth", "head_depth")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Network and images as resolved; fields as in ``ModelOptions``."""

    model: str
    resolution: tuple[int, ...]
    width: int
    heads: int
    trunk_depth: int
    head_depth: int
    patch: int

    @property
    def image_side(self) -> Side:
        """(height, width) in pixels."""
        return self.resolution[0], self.resolution[-1]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The network and the side of its images."""

    model: str | None = None
    """ecar (default), or dit: the baseline (diffusers' DiT under single-scale flow matching, trunk + head blocks
    deep)."""
    preset: str | None = None
    """Model size: nano, ti (default), s, b, l or xl."""
    resolution: tuple[int, ...] = option((), resume="allowed", moves=("stages", "image_side", "velocity_std"))
    """Side of the images in pixels, or height and width; default 32."""
    width: int | None = None
    """Overrides the preset's width."""
    heads: int | None = None
    """Overrides the preset's attention heads."""
    trunk_depth: int | None = None
    """Overrides the preset's trunk blocks."""
    head_depth: int | None = None
    """Overrides the preset's head blocks."""
    patch: int | None = None
    """Side of the squares of latent positions that become one token; default 1. 2 for autoencoders of factor 8 at 256
    pixels (SD-VAE, TAESD, FLUX): 256 tokens, as in DiT."""

    def __post_init__(self) -> None:
        if self.model not in (None, *MODEL_KINDS):
            raise ValueError(f"--model must be one of {', '.join(MODEL_KINDS)}, got {self.model!r}")
        if self.resolution and (len(self.resolution) > 2 or min(self.resolution) < 1):
            raise ValueError(f"--resolution takes one side, or height and width; got {self.resolution}")
        if self.model == "dit" and self.trunk_depth:
            raise ValueError(f"--model dit has one stage and no trunk: leave out --trunk-depth {self.trunk_depth}")

    def resolve(self, before: ModelConfig | None = None) -> Model:
        """These options with what was left open as it is in the model ``before``, else at its default.

        Raises:
            ValueError: an unknown preset, or another kind of model than ``before``.
        """
        from ecar.network.presets import get_preset

        kind = self.model or (before.kind if before else MODEL_KINDS[0])
        if before is not None and kind != before.kind:
            raise ValueError(f"the model to start from (--init-from) is of kind {before.kind}, not {kind}")
        if before is not None and self.preset is None:
            sizes = {name: getattr(before, name) for name in _SIZES}
        else:
            preset = get_preset(self.preset or "ti")
            trunk = 0 if kind == "dit" else preset.trunk_depth
            depths = {"trunk_depth": trunk, "head_depth": preset.depth - trunk}
            sizes = {"width": preset.width, "heads": preset.heads, **depths}
        sizes |= {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        side = before.image_side if before else (32, 32)
        resolution = self.resolution or (side[:1] if side[0] == side[1] else side)
        patch = self.patch if self.patch is not None else before.patch if before else 1
        return Model(model=kind, resolution=resolution, patch=patch, **sizes)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Stages as resolved; fields as in ``StageOptions``."""

    stages: int
    ends: tuple[float, ...]
    rho: float
    context_noise: float
    stage_share: tuple[float, ...]
    stage_weight: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The stages, coarse to fine."""

    stages: int | None = None
    """Number of stages, coarse to fine; default 2, and 1 for dit."""
    ends: tuple[float, ...] | None = option(None, resume="allowed", moves=("stages", "velocity_std"))
    """b_k per stage; default 0.7 for every stage but the last, which ends at 1."""
    rho: float | None = option(None, resume="allowed", moves=("stages", "velocity_std"))
    """Share of noise that a stage takes over from the one before; default 0.7."""
    context_noise: float | None = option(None, resume="allowed")
    """Noise on the maps that the trunk reads; default 0.3."""
    stage_share: tuple[float, ...] = option((), resume="allowed")
    """Share of each batch that trains each stage, non-increasing; default 1 each."""
    stage_weight: tuple[float, ...] = option((), resume="allowed")
    """Loss weight of each stage; default 1 each."""

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"--stages must be at least 1, got {self.stages}")
        noise = self.context_noise
        if noise is not None and not 0 <= noise < math.inf:
            raise ValueError(f"--context-noise must be a number of at least 0, got {noise}")

    def resolve(self, kind: str, before: ModelConfig | None = None) -> Stages:
        """These options with what was left open as it is in the model ``before``, else at its default.

        Raises:
            ValueError: a ``dit`` of several stages, or lists that do not have one entry per stage.
        """
        default = len(before.stages.sides) if before else 1 if kind == "dit" else 2
        stages = self.stages or default
        if kind == "dit" and stages != 1:
            raise ValueError(f"--model dit has one stage and no trunk: leave out --stages {stages}")
        ends, rho, noise = self.ends, self.rho, self.context_noise
        if before is not None:
            ends = before.stages.ends if ends is None and stages == len(before.stages.ends) else ends
            rho = before.stages.rho if rho is None else rho
            noise = before.context_noise if noise is None else noise
        weight = self.stage_weight or (1.0,) * stages
        if len(weight) != stages:
            raise ValueError(f"--stage-weight needs one entry per stage ({stages}), got {weight}")
        if not all(0 <= w < math.inf for w in weight) or sum(weight) == 0:
            raise ValueError(f"--stage-weight must not be negative, nor all zero: {weight}")
        return Stages(
            stages=stages,
            ends=(HAND_OVER,) * (stages - 1) + (1.0,) if ends is None else ends,
            rho=RHO if rho is None else rho,
            context_noise=CONTEXT_NOISE if noise is None else noise,
            stage_share=shares(self.stage_share, stages),
            stage_weight=weight,
        )


def shares(given: tuple[float, ...], stages: int) -> tuple[float, ...]:
    """The share of a batch that trains each stage, from the option ``stage_share``.

    Raises:
        ValueError: not one for each of ``stages``, or a stage that gets more images than the one before it.
    """
    share = given or (1.0,) * stages
    if len(share) != stages:
        raise ValueError(f"--stage-share needs one entry per stage ({stages}), got {share}")
    if share[0] != 1.0 or list(share) != sorted(share, reverse=True) or share[-1] <= 0:
        raise ValueError(f"--stage-share must start at 1 and not increase (a stage needs the ones before), got {share}")
    return share
