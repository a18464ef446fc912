"""Model sizes. Width and total depth follow DiT (2212.09748), so that comparisons are at equal parameters.

"nano" is the size of the bundled models. Any other size is written WIDTHxHEADSxTRUNK+HEAD, as in 192x6x1+6. As in
DiT-XL/2, a patch size may follow, and ``dit-`` before it names the baseline.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace

from ecar.config import ModelConfig, Side, StageConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Kind, width, depths and patch size of a model; fields as in ``ModelConfig``."""

    kind: str = "ecar"
    width: int
    heads: int
    trunk_depth: int
    head_depth: int
    patch: int = 1

    @classmethod
    def of(cls, config: ModelConfig) -> Preset:
        """That of a model."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @property
    def depth(self) -> int:
        """All blocks; DiT's depth."""
        return self.trunk_depth + self.head_depth

    def __str__(self) -> str:
        """As ``get_preset`` reads it."""
        kind, patch = "dit-" if self.kind == "dit" else "", f"/{self.patch}" if self.patch > 1 else ""
        return f"{kind}{self.width}x{self.heads}x{self.trunk_depth}+{self.head_depth}{patch}"


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
    """The preset of that name, or of sizes such as 192x6x1+6 (width, heads, blocks of trunk and head); maybe with a
    patch size, as in xl/2, and of the baseline, as in dit-xl/2, all of whose blocks are in its head.

    Raises:
        ValueError: none of these; it lists the names.
    """
    found = re.fullmatch(r"(dit-)?([^/]+?)(?:/([1-9]\d*))?", name)
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)\+(\d+)", found[2]) if found else None
    if found is None or not (sizes or found[2] in PRESETS):
        raise ValueError(
            f"--preset {name!r}: there is no such model; take one of {', '.join(PRESETS)}, or sizes as in "
            f"{PRESETS['nano']}, maybe with a patch size (xl/2), or of the baseline (dit-xl/2)"
        )
    if sizes is None:
        preset = PRESETS[found[2]]
    else:
        width, heads, trunk, head = map(int, sizes.groups())
        preset = Preset(width=width, heads=heads, trunk_depth=trunk, head_depth=head)
    preset = replace(preset, patch=int(found[3] or 1))
    return replace(preset, kind="dit", trunk_depth=0, head_depth=preset.depth) if found[1] else preset


def default_steps(stages: int) -> tuple[int, ...]:
    """Solver steps per stage, measured as enough: most of them on the few tokens of the first stage."""
    return (8,) + (4,) * (stages - 1)


def preset_config(name: str, *, latent: Side, stages: int, channels: int, classes: int, image: Side) -> ModelConfig:
    """The model of a preset for latents of side ``latent``.

    Raises:
        ValueError: unknown preset, or a latent that does not divide into the stages.
    """
    preset = get_preset(name)
    return ModelConfig(
        stages=StageConfig.for_latent(latent, stages),
        channels=channels,
        **asdict(preset),
        num_classes=classes,
        context_noise=0.0 if preset.kind == "dit" else 0.3,
        image_side=image,
    )
