"""Names of models: sizes, patch size, baseline."""

from __future__ import annotations

import pytest

from ecar.network.presets import PRESETS, Preset, get_preset, preset_config

SIZES = {"latent": (16, 16), "classes": 3, "channels": 4, "image": (64, 64)}


@pytest.mark.parametrize("name", ["xl/2", "dit-xl/2", "nano", "dit-nano", "256x4x1+6/2", "dit-256x4x1+6", "ti/4"])
def test_a_preset_is_read_as_it_is_written(name: str) -> None:
    """A recipe.toml holds the sizes: read again, they are the same model."""
    preset = get_preset(name)
    assert get_preset(str(preset)) == preset
    assert Preset.of(preset_config(name, stages=1, **SIZES)) == preset


def test_the_baseline_of_a_size_has_all_its_blocks_in_the_head() -> None:
    ecar, dit = get_preset("xl/2"), get_preset("dit-xl/2")
    assert (ecar.kind, ecar.patch, ecar.depth) == ("ecar", 2, PRESETS["xl"].depth)
    assert (dit.kind, dit.patch, dit.trunk_depth, dit.head_depth) == ("dit", 2, 0, PRESETS["xl"].depth)


@pytest.mark.parametrize("name", ["", "huge", "xl/0", "xl/", "/2", "xl/2/2", "unet-xl", "192x6x7", "dit", "xl\n"])
def test_a_preset_that_is_none_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"--preset .*nano, ti, s, b, l, xl.*192x6x1\+6"):
        get_preset(name)
