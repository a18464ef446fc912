"""Model sizes. Width and total depth follow DiT (2212.09748), so that comparisons are at equal parameters.

"nano" is the size of the bundled models. Any other size is written WIDTHxHEADSxTRUNK+HEAD, as in 192x6x1+6.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

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

    def __str__(self) -> str:
        """As ``get_preset`` reads it."""
        return f"{self.width}x{self.heads}x{self.trunk_depth}+{self.head_depth}"

    def of_kind(self, kind: str) -> Preset:
        """The same for a kind of model: all blocks of a ``dit`` are in its head."""
        return replace(self, trunk_depth=0, head_depth=self.depth) if kind == "dit" else self


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
    """The preset of that name, or of sizes such as 192x6x1+6 (width, heads, blocks of trunk and head).

    Raises:
        ValueError: neither; it lists the names.
    """
    if name in PRESETS:
        return PRESETS[name]
    if (sizes := re.fullmatch(r"(\d+)x(\d+)x(\d+)\+(\d+)", name)) is None:
        raise ValueError(
            f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}, or sizes as in {PRESETS['nano']}"
        )
    width, heads, trunk, head = map(int, sizes.groups())
    return Preset(width=width, heads=heads, trunk_depth=trunk, head_depth=head)


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
    return ModelConfig(
        kind=kind,
        stages=StageConfig.for_latent(latent, stages),
        channels=channels,
        patch=patch,
        **asdict(get_preset(preset).of_kind(kind)),
        num_classes=classes,
        context_noise=0.0 if kind == "dit" else 0.3,
        image_side=image,
    )
