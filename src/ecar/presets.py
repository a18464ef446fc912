"""Model sizes. Width and total depth follow DiT (2212.09748), so that comparisons are at equal parameters.

"nano" is the size of the bundled model. The split of the depth between trunk and head is a setting of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    "nano": Preset(width=192, heads=6, trunk_depth=2, head_depth=5),
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
