"""Model sizes. Width and total depth follow DiT (2212.09748), so that comparisons are at equal parameters.

"nano" is the size of the bundled model. The split of the depth between trunk and head is a setting of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecar.config import ModelConfig, Side, StageConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Width and depths of a model size."""

    width: int
    heads: int
    trunk_depth: int
    head_depth: int

    @property
    def depth(self) -> int:
        """All blocks; DiT's depth."""
        return self.trunk_depth + self.head_depth


#                      width       heads      trunk           head
PRESETS: dict[str, Preset] = {
    "nano": Preset(width=192, heads=6, trunk_depth=1, head_depth=6),
    "ti": Preset(width=192, heads=6, trunk_depth=4, head_depth=4),
    "s": Preset(width=384, heads=6, trunk_depth=6, head_depth=6),
    "b": Preset(width=768, heads=12, trunk_depth=7, head_depth=5),
    "l": Preset(width=1024, heads=16, trunk_depth=16, head_depth=8),
    "xl": Preset(width=1152, heads=16, trunk_depth=20, head_depth=8),
}


def get_preset(name: str) -> Preset:
    """The preset of that name; ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def default_steps(stages: int) -> tuple[int, ...]:
    """Solver steps per stage, measured as enough: most of them on the few tokens of the first stage."""
    return (8,) + (4,) * (stages - 1)


def preset_config(
    kind: str, preset: str, *, latent: Side, stages: int, channels: int, classes: int, image: Side, patch: int = 1
) -> ModelConfig:
    """The model of a preset for latents of side ``latent``; all blocks of a ``dit`` are in its head.

    Raises:
        ValueError: unknown preset, or a latent that does not divide into the stages.
    """
    size, dit = get_preset(preset), kind == "dit"
    return ModelConfig(
        kind=kind,
        stages=StageConfig.for_latent(latent, stages),
        channels=channels,
        patch=patch,
        width=size.width,
        heads=size.heads,
        trunk_depth=0 if dit else size.trunk_depth,
        head_depth=size.depth if dit else size.head_depth,
        num_classes=classes,
        context_noise=0.0 if dit else 0.3,
        image_side=image,
    )
