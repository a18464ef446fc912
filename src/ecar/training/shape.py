"""Options of the model and its stages, and the same without anything left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ecar.config import STAGE_END, ModelConfig, Side, image_side

if TYPE_CHECKING:
    from ecar.network.presets import Preset


@dataclass(frozen=True, kw_only=True)
class Model:
    """Network and images as resolved; fields as in ``ModelOptions``, ``preset`` as sizes."""

    preset: str
    resolution: tuple[int, ...]

    @property
    def architecture(self) -> Preset:
        """The preset, read."""
        from ecar.network.presets import get_preset

        return get_preset(self.preset)

    @property
    def image_side(self) -> Side:
        """(height, width) in pixels."""
        return image_side(self.resolution)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The network and the side of its images."""

    preset: str | None = None
    """Model: nano, ti (default), s, b, l, xl, or WIDTHxHEADSxTRUNK+HEAD, as in 192x6x1+6: attention heads, then blocks
    of trunk and head. A patch size may follow, as in xl/2: that side of latent positions is one token. 2 suits
    autoencoders of factor 8 at 256 pixels (SD-VAE, TAESD, FLUX). dit-xl/2 is the baseline of that size: diffusers'
    DiT, by flow matching in one stage."""
    resolution: tuple[int, ...] = ()
    """Side of the images in pixels, or height and width; default 32."""

    def __post_init__(self) -> None:
        if self.resolution:
            image_side(self.resolution)

    def resolve(self, before: ModelConfig | None = None) -> Model:
        """These options with what was left open as it is in the model ``before``, else at its default.

        Raises:
            ValueError: an unknown preset, or another kind of model than ``before``.
        """
        from ecar.network.presets import Preset, get_preset

        preset = Preset.of(before) if before and self.preset is None else get_preset(self.preset or "ti")
        if before and preset.kind != before.kind:
            raise ValueError(f"the model to start from (--init-from) is of kind {before.kind}, not {preset.kind}")
        side = before.image_side if before else (32, 32)
        resolution = self.resolution or (side[:1] if side[0] == side[1] else side)
        return Model(preset=str(preset), resolution=resolution)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Stages as resolved; fields as in ``StageOptions``, ``stages`` as b_k of each."""

    stages: tuple[float, ...]
    stage_share: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The stages, coarse to fine."""

    stages: tuple[float, ...] = ()
    """Number of stages, coarse to fine; default 2, and 1 for the baseline. Or b_k of each, as in 0.7 0.8 1; default 0.7
    for every stage but the last, which ends at 1."""
    stage_share: tuple[float, ...] = ()
    """Share of each batch that trains each stage, non-increasing but for 0, which leaves a stage out of the loss;
    default 1 each."""

    def __post_init__(self) -> None:
        if isinstance(self.stages, int):  # one number stands for itself
            object.__setattr__(self, "stages", (float(self.stages),))
        if len(self.stages) == 1 and (self.stages[0] < 1 or self.stages[0] % 1):
            raise ValueError(f"--stages takes the number of stages, or b_k of each, got {self.stages[0]:g}")

    def resolve(self, kind: str, before: ModelConfig | None = None) -> Stages:
        """These options with what was left open as it is in the model ``before``, else at its default.

        Raises:
            ValueError: a ``dit`` of several stages, or shares that are not one for each stage.
        """
        ends = self.stages
        if len(ends) < 2:
            known = before.stages.ends if before else ()
            count = int(ends[0]) if ends else len(known) or (1 if kind == "dit" else 2)
            ends = known if count == len(known) else (STAGE_END,) * (count - 1) + (1.0,)
        elif ends[-1] != 1 or not all(0 < end < 1 for end in ends[:-1]):
            raise ValueError(f"--stages takes the number of stages, or b_k of each: in (0, 1), the last 1; got {ends}")
        if kind == "dit" and len(ends) != 1:
            raise ValueError(f"the baseline (dit-...) has one stage and no trunk, but --stages asks for {len(ends)}")
        return Stages(stages=ends, stage_share=shares(self.stage_share, len(ends)))


def shares(given: tuple[float, ...], stages: int) -> tuple[float, ...]:
    """The share of a batch that trains each stage, from the option ``stage_share``.

    Raises:
        ValueError: not one for each of ``stages``, or a stage that gets more images than the one before it.
    """
    share = given or (1.0,) * stages
    trained = [part for part in share if part != 0]
    if len(share) != stages:
        raise ValueError(f"--stage-share needs one entry per stage ({stages}), got {share}")
    if trained[:1] != [1.0] or trained != sorted(trained, reverse=True) or trained[-1] < 0:
        raise ValueError(f"--stage-share must start at 1 and not increase (a stage needs the ones before), got {share}")
    return share


def through(share: tuple[float, ...]) -> tuple[float, ...]:
    """Share of a batch that goes through each stage: one that is left out of the loss has that of the next."""
    return tuple(next((part for part in share[place:] if part), 0.0) for place in range(len(share)))
