"""LoRA: the base stays as it is, what is new is trained whole, and adapter + base are the merged model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune import saved, tuned
from test_training import killed_at_five, lines, options, weights

from conftest import load_checkpoint
from ecar.pretrained.folders import load_model
from ecar.sampling.pipeline import Pipeline
from ecar.training import loop

pytest.importorskip("peft")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source", class_names=("cat", "one", "ZERO"))  # in the order of folders


@pytest.fixture
def same_classes(digits_folder: Path, tmp_path: Path) -> Path:
    """Data with the classes of the source."""
    for old, new in (("zero", "ZERO"), ("one", "one"), ("seven", "cat")):
        shutil.copytree(digits_folder / old, tmp_path / "data" / new)
    return tmp_path / "data"


def lora(data: Path, out: Path, source: Path, **changes: Any) -> Path:
    return loop.train(tuned(data, out, source, **{"lora_rank": 2, "lr": 1e-2, **changes}))


def test_only_attention_changes_and_the_adapter_on_the_base_is_the_merged_model(
    same_classes: Path, tmp_path: Path, source: Path
) -> None:
    final = lora(same_classes, tmp_path / "run", source)
    before, after = load_file(source / "model.safetensors"), load_file(final / "model.safetensors")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.endswith(("to_qkv.weight", "to_out.weight"))}
    assert all(torch.linalg.matrix_rank(after[k] - before[k], rtol=1e-3) <= 2 for k in changed)
    asked = {"device": "cpu", "adapter": tmp_path / "run" / "adapter"}
    a = Pipeline.from_pretrained(source, **asked)  # type: ignore[arg-type]
    state = a.model.state_dict()
    assert set(state) == set(after) and all(torch.allclose(state[k], after[k], atol=1e-6) for k in after)
    trained = sum(2 * 16 * (4 if k.endswith("to_qkv.weight") else 2) for k in changed)
    assert lines(tmp_path / "run")[0]["trained_parameters"] == trained


def test_new_classes_are_trained_whole_and_come_with_the_adapter(
    digits_folder: Path, tmp_path: Path, source: Path
) -> None:
    final = lora(digits_folder, tmp_path / "run", source)
    pipe = Pipeline.from_pretrained(source, device="cpu", adapter=tmp_path / "run" / "adapter")
    merged = Pipeline.from_pretrained(final, device="cpu")
    assert pipe.class_names == ("one", "seven", "zero")
    images = [p(["seven", "one"], seeds=[0, 1]).images for p in (pipe, merged)]
    assert [x.tobytes() for x in images[0]] == [x.tobytes() for x in images[1]]
    before, after = load_model(source)[0], merged.model
    old, new = before.head.class_embedding.weight, after.head.class_embedding.weight
    assert not torch.equal(new[0], old[1]) and torch.allclose(new[0], old[1], atol=0.2)  # one: from its row, trained
    assert torch.equal(after.head.map_in.weight, before.head.map_in.weight)


def test_a_resumed_adapter_run_is_bit_for_bit_the_whole_one_without_its_source(
    digits_folder: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(digits_folder, tmp_path / "whole", source, optimizer="muon", ema=(0.5, 0.9))
    with killed_at_five(monkeypatch):
        lora(digits_folder, tmp_path / "parts", source, optimizer="muon", ema=(0.5, 0.9))
    shutil.rmtree(source)
    lora(digits_folder, tmp_path / "parts", source, optimizer="muon", ema=(0.5, 0.9))
    for name in ("final/model", "final_ema_0.9/model", "adapter/adapter_model"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    state = load_checkpoint(tmp_path / "parts")
    assert state is not None
    averaged = {k for k in state[0] if k.startswith("ema.")}
    assert averaged and all(".lora_" in k or ".class_embedding." in k for k in averaged)


def test_peft_itself_loads_the_adapter(same_classes: Path, tmp_path: Path, source: Path) -> None:
    from peft import PeftModel

    final = lora(same_classes, tmp_path / "run", source)
    plain = PeftModel.from_pretrained(load_model(source)[0], str(tmp_path / "run" / "adapter")).merge_and_unload()
    after = load_file(final / "model.safetensors")
    state = plain.state_dict()
    assert all(torch.allclose(state[k], after[k], atol=1e-6) for k in after)


def test_new_blocks_are_trained_whole_beside_the_adapter(same_classes: Path, tmp_path: Path, source: Path) -> None:
    final = lora(same_classes, tmp_path / "run", source, preset="16x2x2+3", max_steps=3)
    after = load_file(final / "model.safetensors")
    assert after["head.blocks.2.modulation.weight"].abs().max() > 0  # it began at zero
    pipe = Pipeline.from_pretrained(source, device="cpu", adapter=tmp_path / "run" / "adapter")
    assert torch.allclose(
        pipe.model.state_dict()["head.blocks.2.mlp.w_in.weight"], after["head.blocks.2.mlp.w_in.weight"]
    )


def test_an_adapter_is_refused_on_another_base_and_when_it_is_damaged(
    same_classes: Path, tmp_path: Path, source: Path
) -> None:
    final = lora(same_classes, tmp_path / "run", source, max_steps=1)
    folder = tmp_path / "run" / "adapter"
    with pytest.raises(ValueError, match="not of weights"):
        Pipeline.from_pretrained(final, adapter=folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 tensors, such as"):
        Pipeline.from_pretrained(source, adapter=folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="not an adapter of ecar"):
        Pipeline.from_pretrained(source, adapter=folder)


def test_a_dit_takes_an_adapter_in_diffusers_own_names(digits_folder: Path, tmp_path: Path) -> None:
    dit = options(digits_folder, tmp_path / "a", preset="dit-16x2x1+1", max_steps=3)
    first = loop.train(dit)
    final = lora(digits_folder, tmp_path / "b", first)
    before, after = weights(tmp_path / "a"), load_file(final / "model.safetensors")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(".attn1.to_" in k for k in changed)


@pytest.mark.parametrize("changes", [{"lora_rank": 0}, {"init_from": None}])
def test_lora_options_that_mean_nothing_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora"):
        tuned(tmp_path, tmp_path, tmp_path, **{"lora_rank": 2, **changes})
