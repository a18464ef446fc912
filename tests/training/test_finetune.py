"""--init-from: what fits is loaded, what does not is named, and a resumed run does not need the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import killed_at_five, lines, options, weights

from conftest import random_model, tiny_config
from ecar.config import ModelConfig, SamplingConfig, StageConfig
from ecar.network.model import ECAR
from ecar.pretrained.build import build_model
from ecar.pretrained.folders import load_model, save_model
from ecar.pretrained.transfer import class_rows, transfer
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import PixelTokenizer
from ecar.training import loop
from ecar.training.config import TrainConfig

FREE: dict[str, Any] = {
    "tokenizer": None, "resolution": (), "preset": None,
}  # fmt: skip


def tuned(data: Path, out: Path, source: Path, **changes: Any) -> TrainConfig:
    """A run that leaves everything that it can to the source."""
    return options(data, out, **{**FREE, "init_from": str(source), **changes})


def small(**changes: Any) -> ModelConfig:
    base = tiny_config(
        stages=StageConfig(sides=((2, 2), (4, 4)), ends=(0.7, 1.0)), channels=12, image_side=(8, 8),
        class_names=("ZERO", "cat", "one"), velocity_std=(1.1, 0.9), context_noise=0.2,
        sampling=SamplingConfig(steps=(3, 2), guidance=(1.0, 1.0)),
    )  # fmt: skip
    return base.replace(**changes)


def saved(folder: Path, **changes: Any) -> Path:
    """A model folder with its own tokenizer."""
    tokenizer = PixelTokenizer(factor=2)
    tokenizer.measure([torch.rand(8, 12, 4, 4)])
    save_model(folder, random_model(small(tokenizer=tokenizer.fingerprint(), **changes)), tokenizer)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source")


def moved(config: ModelConfig, before: ModelConfig | None = None) -> tuple[ECAR, ECAR, Any]:
    """A model of ``config`` filled from a random one, that one, and the report."""
    theirs = random_model(before or small(), seed=1)
    ours = build_model(config)
    assert isinstance(ours, ECAR)
    return ours, theirs, transfer(theirs.state_dict(), theirs.config, ours)


def test_classes_of_the_same_name_keep_their_rows_in_trunk_and_head_and_so_does_the_null_class() -> None:
    config = small(num_classes=4, class_names=("dog", "one", "zero", "bird"))
    ours, theirs, report = moved(config)
    for part in ("trunk", "head"):
        new, old = (getattr(m, part).class_embedding.weight for m in (ours, theirs))
        assert torch.equal(new[[1, 2, 4]], old[[2, 0, 3]])  # one, zero (spelled ZERO), the null class
        assert not any(torch.equal(new[i], row) for i in (0, 3) for row in old)
    assert set(report.fresh) == {"trunk.class_embedding.weight", "head.class_embedding.weight"}
    assert any("2 of 4 classes (dog, bird)" in note for note in report.notes)
    assert any("1 classes (cat)" in note for note in report.notes)


def test_names_that_become_the_same_without_case_match_only_exactly() -> None:
    before = small(class_names=("a b", "AB", "one"))
    assert class_rows(before, small(class_names=("ab", "AB", "One"))) == {3: 3, 1: 1, 2: 2}  # "ab" could be either


def test_another_resolution_and_class_table_of_the_same_names_loads_everything() -> None:
    config = small(stages=StageConfig(sides=((4, 6), (8, 12)), ends=(0.7, 1.0)))
    ours, theirs, report = moved(config)
    assert report.fresh == () and report.notes == ()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_deeper_model_starts_as_the_same_function_and_names_its_new_blocks() -> None:
    ours, theirs, report = moved(small(trunk_depth=3, head_depth=4))
    labels, x = torch.tensor([0, 2]), torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    ends = [torch.randn(2, 12, 2, 2, generator=torch.Generator().manual_seed(1))]
    stage, t = ours.plan[1], torch.tensor([0.2, 0.7])
    v = [m.velocity(stage, x, t, m.head.embed_tokens(stage, m.trunk(ends, labels)[1]), labels) for m in (ours, theirs)]
    assert torch.allclose(v[0], v[1], atol=1e-5)
    assert [n.split(" (")[0] for n in report.notes] == [
        f"initialised fresh: {block}" for block in ("trunk.blocks.2", "head.blocks.2", "head.blocks.3")
    ]


def test_a_stage_more_keeps_the_rows_of_the_stages_whose_levels_stay() -> None:
    three = StageConfig(sides=((2, 2), (4, 4), (8, 8)), ends=(0.7, 0.7, 1.0))
    ours, theirs, report = moved(small(stages=three, velocity_std=(), sampling=None))
    new, old = ours.head.stage_embedding.weight, theirs.head.stage_embedding.weight
    assert torch.equal(new[0], old[0]) and torch.equal(new[2], old[1])
    assert "initialised fresh: the stage rows of stage 2 of 3" in report.notes


def test_other_channels_leave_out_the_layers_at_the_maps_only() -> None:
    ours, theirs, report = moved(small(channels=3))
    assert set(report.fresh) == {
        "trunk.map_in.weight",
        "head.map_in.weight",
        "head.map_out.weight",
        "head.map_out.bias",
    }
    assert torch.equal(ours.head.map_in.bias, theirs.head.map_in.bias)


@pytest.mark.parametrize(("preset", "word"), [("32x2x2+2", "width 16"), ("16x4x2+2", "heads 2")])
def test_a_model_of_which_nothing_fits_is_refused_before_images_are_read(
    source: Path, tmp_path: Path, preset: str, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        loop.train(tuned(tmp_path / "no data here", tmp_path / "run", source, preset=preset))
    with pytest.raises(ValueError, match="of kind ecar, not dit"):
        loop.train(tuned(tmp_path / "no data here", tmp_path / "run", source, preset="dit-nano", stages=1))


def test_what_the_user_leaves_open_is_the_sources_and_what_he_says_wins(
    digits_folder: Path, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = loop.train(tuned(digits_folder, tmp_path / "run", source, max_steps=1))
    made, tokenizer = load_model(final)
    before, own = load_model(source)
    same = (
        "stages",
        "width",
        "heads",
        "trunk_depth",
        "head_depth",
        "context_noise",
        "sampling",
        "velocity_std",
        "image_side",
    )
    assert all(getattr(made.config, name) == getattr(before.config, name) for name in same)
    assert tokenizer.fingerprint() == own.fingerprint() and made.config.class_names == ("one", "seven", "zero")
    error = capsys.readouterr().err
    assert error.count("the rows of 1 of 3 classes (seven)") == 1 and "left out of the source" in error
    record = json.loads((final / "training.json").read_text())
    assert record["init_from"] == str(source) and record["resolution"] == [8] and record["source"]["notes"]
    assert lines(tmp_path / "run")[0]["init_from"] == record["source"]
    said = tuned(
        digits_folder, tmp_path / "b", source, max_steps=1, resolution=(16,), preset="16x2x2+1",
        tokenizer="pixels:4", stages=(0.5, 0.6, 1.0),
    )  # fmt: skip
    other = load_model(loop.train(said))[0].config
    assert other.image_side == (16, 16) and other.stages.sides == ((1, 1), (2, 2), (4, 4)) and other.channels == 48
    assert other.head_depth == 1 and other.context_noise == 0.2 and other.stages.ends == (0.5, 0.6, 1.0)


def test_a_guided_source_on_images_without_labels_draws_its_sample_grids(digits_folder: Path, tmp_path: Path) -> None:
    """The guidance that it took over was refused at the first grid, and at every start after that."""
    guided = SamplingConfig(steps=(3, 2), guidance=(1.5, 2.0), guidance_from=(0.5, 0.0))
    source = saved(tmp_path / "source", sampling=guided)
    final = loop.train(tuned(digits_folder / "one", tmp_path / "run", source, max_steps=1))
    assert load_model(final)[0].config.sampling == SamplingConfig(steps=(3, 2), guidance=(1.0, 1.0))


def test_a_model_distilled_for_its_steps_is_trained_on_for_any(digits_folder: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", sampling=SamplingConfig(steps=(2, 1), guidance=(1.0,) * 2, fixed_steps=True))
    own = load_model(loop.train(tuned(digits_folder, tmp_path / "run", source, max_steps=1)))[0].config.sampling
    assert own is not None and own.steps == (8, 4) and not own.fixed_steps


def test_a_run_of_no_effect_is_the_source(digits_folder: Path, tmp_path: Path, source: Path) -> None:
    """Same classes, levels and latents: with a rate of almost nothing, the samples are the source's own."""
    for old, new in (("zero", "ZERO"), ("one", "one"), ("seven", "cat")):
        shutil.copytree(digits_folder / old, tmp_path / "data" / new)
    final = loop.train(tuned(tmp_path / "data", tmp_path / "run", source, max_steps=1, lr=1e-12))
    a, b = (Pipeline.from_pretrained(f, device="cpu")(["cat", None], seeds=[3, 4]).images for f in (source, final))
    assert [x.tobytes() for x in a] == [x.tobytes() for x in b]


def test_a_resumed_run_needs_no_source_and_is_bit_for_bit_the_whole_one(
    digits_folder: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(tuned(digits_folder, tmp_path / "whole", source))
    with killed_at_five(monkeypatch):
        loop.train(tuned(digits_folder, tmp_path / "parts", source))
    shutil.rmtree(source)
    loop.train(tuned(digits_folder, tmp_path / "parts", source))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)
    clocks = {"seconds": 0, "images_per_second": 0}
    logs = [[{**line, **clocks} for line in lines(tmp_path / out)] for out in ("whole", "parts")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(7))


def test_killed_before_its_first_checkpoint_the_source_is_read_again_not_forgotten(
    digits_folder: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leftover of a killed first save is no checkpoint: random weights would be trained without a word."""

    def dies(_: loop.Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tuned(digits_folder, tmp_path / "run", source))
    monkeypatch.undo()
    (tmp_path / "run" / "checkpoints" / "step_00000003.tmp").mkdir(parents=True)
    loop.train(tuned(digits_folder, tmp_path / "run", source, lr=1e-12))
    made, theirs = weights(tmp_path / "run"), load_file(source / "model.safetensors")
    assert torch.allclose(made["head.map_out.weight"], theirs["head.map_out.weight"], atol=1e-5)


def test_a_dit_starts_from_a_dit(digits_folder: Path, tmp_path: Path) -> None:
    first = loop.train(options(digits_folder, tmp_path / "a", preset="dit-16x2x0+1", max_steps=2))
    shutil.copytree(digits_folder / "one", tmp_path / "data" / "one")
    shutil.copytree(digits_folder / "zero", tmp_path / "data" / "null")
    final = loop.train(tuned(tmp_path / "data", tmp_path / "b", first, max_steps=1, lr=1e-12))
    a, b = load_file(first / "model.safetensors"), load_file(final / "model.safetensors")
    table = next(k for k in a if k.endswith("embedding_table.weight"))
    assert torch.allclose(a[table][[0, 3]], b[table][[1, 2]], atol=1e-6)  # one, and the null class
    same = [k for k in a if a[k].shape == b[k].shape]
    assert len(same) == len(a) - 1 and all(torch.allclose(a[k], b[k], atol=1e-6) for k in same)


def test_the_bundled_model_starts_a_run_of_own_images_in_one_call(digits_folder: Path, tmp_path: Path) -> None:
    config = tuned(digits_folder, tmp_path, Path("fashion"), max_steps=1)
    made, bundled = load_model(loop.train(config))[0].config, load_model("fashion")[0].config
    assert (made.image_side, made.stages) == (bundled.image_side, bundled.stages)
    assert made.class_names == ("one", "seven", "zero")
