"""The pipeline's promises: an image depends on its seed, label and settings alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import random_model, tiny_config
from ecar.config import SamplingConfig
from ecar.pretrained.folders import load_model, save_model
from ecar.sampling.known import Known
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.sampling.pictures import grid, strip, to_uint8
from ecar.sampling.pipeline import Pipeline, StagePreview
from ecar.tokenizers import PixelTokenizer


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))


def settings(**changes: object) -> SamplingConfig:
    values: dict[str, object] = {"steps": (3, 2, 2), "guidance": (1.0, 1.0, 1.0)}
    return SamplingConfig(**{**values, **changes})  # type: ignore[arg-type]


def latents(pipe: Pipeline, labels: list[int], seeds: list[int], config: SamplingConfig) -> torch.Tensor:
    noise = draw_noise(seeds, pipe.model.plan, pipe.model.config.channels)
    return sample_latents(pipe.model, torch.tensor(labels), noise, config)


@pytest.mark.parametrize("guidance", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.0, 1.5, 3.0), (1.0, 3.0, 1.0)])
def test_an_image_is_the_same_alone_and_in_a_batch_of_eight(pipe: Pipeline, guidance: tuple[float, ...]) -> None:
    labels, seeds = [0, 1, 2, 0, 1, 2, 0, 1], [5, 6, 7, 8, 9, 10, 11, 12]
    together = latents(pipe, labels, seeds, settings(guidance=guidance))
    for row in (0, 3, 7):
        alone = latents(pipe, labels[row : row + 1], seeds[row : row + 1], settings(guidance=guidance))
        assert torch.allclose(alone[0], together[row], atol=1e-4)


def test_guidance_of_almost_one_is_continuous_with_off(pipe: Pipeline) -> None:
    """The doubled batch and the plain one are two code paths of one function; rows must not be mixed up."""
    off = latents(pipe, [0, 1, 2], [1, 2, 3], settings())
    near = latents(pipe, [0, 1, 2], [1, 2, 3], settings(guidance=(1.0 + 1e-6, 1.0, 1.0)))
    last = latents(pipe, [0, 1, 2], [1, 2, 3], settings(guidance=(1.0, 1.0, 1.0 + 1e-6)))
    for other in (near, last):
        assert torch.allclose(off, other, atol=1e-3)


def test_guidance_from_a_time_on_acts_only_then(pipe: Pipeline) -> None:
    """From 0 it is guidance everywhere; from beyond the last step's time it is none; between, neither."""
    guided = {"guidance": (3.0, 1.0, 2.0)}
    off, everywhere = (latents(pipe, [0, 1], [1, 2], settings(**g)) for g in ({}, guided))
    zero, late, some = (
        latents(pipe, [0, 1], [1, 2], settings(**guided, guidance_from=starts))
        for starts in ((0.0, 0.0, 0.0), (0.9, 0.0, 0.9), (0.3, 0.0, 0.0))
    )
    assert torch.equal(zero, everywhere) and torch.allclose(late, off, atol=1e-4)
    assert not torch.allclose(some, everywhere, atol=1e-3) and not torch.allclose(some, off, atol=1e-3)


def test_guidance_of_zero_ignores_the_class(pipe: Pipeline) -> None:
    null = pipe.model.config.null_class
    zero = latents(pipe, [0, 2], [1, 2], settings(guidance=(0.0, 0.0, 0.0)))
    assert torch.allclose(zero, latents(pipe, [null, null], [1, 2], settings()), atol=1e-4)


def test_other_seeds_and_other_labels_give_other_images(pipe: Pipeline) -> None:
    x = latents(pipe, [0, 0, 1], [1, 2, 1], settings())
    assert not torch.allclose(x[0], x[1]) and not torch.allclose(x[0], x[2])


def test_seeds_that_differ_in_their_high_bits_draw_other_noise(pipe: Pipeline) -> None:
    seeds = [5, 5 + 2**32, 5 + 2**52, 5 + 2**52 + 2**32, 2**53 - 1, 2**32 - 1]
    noise = draw_noise(seeds, pipe.model.plan, pipe.model.config.channels)[0].fresh
    assert len(noise.flatten(1).unique(dim=0)) == len(seeds)
    known = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise[0], known)  # seeds below 2^32 draw what they always drew


def test_stage_callback_gets_every_stage_in_order_and_sizes(pipe: Pipeline) -> None:
    seen: list[StagePreview] = []
    out = pipe(["cat", "dog"], seeds=[0, 1], on_stage=seen.append, return_stages=True)
    assert [(p.stage, p.num_stages, p.images[0].size) for p in seen] == [
        (1, 3, (3, 2)),
        (2, 3, (6, 4)),
        (3, 3, (12, 8)),
    ]
    assert [len(s) for s in out.stages] == [2, 2, 2]
    assert np.array_equal(np.asarray(out.stages[-1][1]), np.asarray(out.images[1]))
    assert strip(out.stages).size == (3 * 12, 2 * 8)
    plain = pipe(["cat", "dog"], seeds=[0, 1])
    assert np.array_equal(np.asarray(plain.images[1]), np.asarray(out.images[1]))  # looking does not disturb


def test_batches_do_not_change_images(pipe: Pipeline) -> None:
    whole, parts = (pipe([0, 1, 2, 0, 1], batch_size=b).images for b in (5, 2))
    for a, b in zip(whole, parts, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_bfloat16_weights_draw_nearly_the_same_images(pipe: Pipeline, tmp_path: Path) -> None:
    """--dtype bf16 once failed on positions made in float32."""
    save_model(tmp_path, pipe.model, pipe.tokenizer)
    exact = pipe([0, 1, 2]).images
    rough = Pipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)([0, 1, 2]).images
    difference = [np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() for a, b in zip(exact, rough, strict=True)]
    assert 0 < max(difference) < 8


def test_class_names_are_found_by_name_id_and_spelling(pipe: Pipeline) -> None:
    assert [pipe.class_id(x) for x in ("cat", "DOG", "red-bird", "Red bird", 1, "2", None)] == [0, 1, 2, 2, 1, 2, 3]


def test_class_called_by_a_number_is_found_by_name_first() -> None:
    """Folders named 1, 2, 3 once drew the class beside the one asked for."""
    pipe = Pipeline(random_model(tiny_config(class_names=("1", "2", "C++"))), PixelTokenizer(factor=1))
    assert [pipe.class_id(x) for x in ("1", "2", 1, np.int64(2), torch.tensor(0), "0", "c")] == [0, 1, 1, 2, 0, 0, 2]
    pipe = Pipeline(random_model(tiny_config(class_names=("C", "C#", "c++"))), PixelTokenizer(factor=1))
    assert [pipe.class_id(x) for x in ("C", "c", "c#", "C ++")] == [0, 0, 1, 2]
    pipe = Pipeline(random_model(tiny_config(class_names=("C++", "C#", "D"))), PixelTokenizer(factor=1))
    with pytest.raises(ValueError, match="spell it exactly"):
        pipe.class_id("c")


def test_unknown_class_offers_the_nearest_names(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="did you mean Red bird"):
        pipe.class_id("redbrd")
    with pytest.raises(ValueError, match=r"0\.\.2"):
        pipe.class_id(3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"steps": (8, 8)}, "steps needs 3"),
        ({"steps": 0}, "positive"),
        ({"guidance": (1.0,)}, "guidance needs"),
        ({"guidance": -1.0}, "0..100"),
        ({"guidance": float("nan")}, "0..100"),
        ({"settings": settings(steps=(8, 8))}, "steps needs 3"),
        ({"settings": settings(), "steps": 3}, "hold steps and guidance already"),
        ({"settings": settings(), "guidance": 2.0}, "hold steps and guidance already"),
        ({"seeds": [1]}, "2 labels but 1 seeds"),
        ({"seeds": [1, -1]}, "seed must be"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_refused(pipe: Pipeline, arguments: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(word)):
        pipe(["cat", "dog"], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"solver": "magic"}, "unknown solver"),
        ({"guidance_from": 1.0}, "[0, 1)"),
        ({"guidance_from": (0.5, 0.0)}, "one per stage"),
    ],
)
def test_wrong_settings_are_refused(pipe: Pipeline, arguments: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(word)):
        pipe.settings(**arguments)  # type: ignore[arg-type]


def test_one_number_holds_for_every_stage_whatever_it_is_of(pipe: Pipeline) -> None:
    """One number of guidance acted on every stage but the last, one of steps on all."""
    made = pipe.settings(steps=5, guidance=2, guidance_from=0.5)
    assert (made.steps, made.guidance, made.guidance_from) == ((5,) * 3, (2.0,) * 3, (0.5,) * 3)
    assert pipe.settings(guidance=(2, 1, 1)).guidance == (2.0, 1.0, 1.0)


def test_settings_and_the_shortcuts_draw_the_same_images(pipe: Pipeline) -> None:
    short = pipe(["cat"], seeds=[3], steps=2, guidance=(2.0, 1.0, 1.0))
    long = pipe(["cat"], seeds=[3], settings=pipe.settings(steps=2, guidance=(2.0, 1.0, 1.0)))
    assert np.array_equal(short.images[0], long.images[0]) and short.settings == long.settings
    other = pipe(["cat"], seeds=[3], settings=pipe.settings(steps=2, guidance=2.0, solver="heun"))
    assert other.settings.solver == "heun" and not np.array_equal(other.images[0], long.images[0])


def test_guidance_without_classes_is_refused_not_ignored() -> None:
    pipe = Pipeline(random_model(tiny_config(num_classes=0, class_names=())), PixelTokenizer(factor=1))
    assert len(pipe(seeds=[0, 1]).images) == 2
    with pytest.raises(ValueError, match="without labels"):
        pipe(seeds=[0], guidance=2.0)
    with pytest.raises(ValueError, match="without labels"):
        pipe(seeds=[0], settings=settings(guidance=(2.0, 1.0, 1.0)))


def test_non_finite_images_are_an_error_not_a_black_picture() -> None:
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_grid_places_images_row_by_row(pipe: Pipeline) -> None:
    images = pipe([0, 1, 2]).images
    sheet = np.asarray(grid(images, 2))
    assert sheet.shape == (16, 24, 3)
    assert np.array_equal(sheet[8:, :12], np.asarray(images[2])) and not sheet[8:, 12:].any()


def test_save_and_load_give_the_same_images(pipe: Pipeline, tmp_path: Path) -> None:
    save_model(tmp_path, pipe.model, pipe.tokenizer)
    again = Pipeline.from_pretrained(tmp_path)
    assert again.model.config == pipe.model.config
    assert np.array_equal(np.asarray(again(["dog"]).images[0]), np.asarray(pipe(["dog"]).images[0]))


def test_model_refuses_the_latents_of_another_tokenizer() -> None:
    model = random_model(tiny_config(tokenizer=PixelTokenizer(factor=1).fingerprint()))
    Pipeline(model, PixelTokenizer(factor=1))
    with pytest.raises(ValueError, match="reads latents of tokenizer"):
        Pipeline(model, PixelTokenizer(factor=2))


def test_damaged_folders_are_refused_with_the_reason(pipe: Pipeline, tmp_path: Path) -> None:
    save_model(tmp_path, pipe.model, pipe.tokenizer)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, record = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_model(tmp_path)
    weights.unlink()
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"missing weights.*pickle"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="never loaded"):
        load_model(tmp_path / "model.pt")
    weights.write_bytes(whole)
    record["model"]["width"] = 32
    config.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="another shape"):
        load_model(tmp_path)
    record["model"]["colour"] = 1
    config.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="bundled models"):
        load_model("no-such-model")


def test_known_stages_continue_as_if_they_had_been_sampled() -> None:
    model = random_model(tiny_config())
    noise, labels = draw_noise([1, 2], model.plan, 3), torch.tensor([0, 2])
    guided = settings(guidance=(2.0, 1.0, 1.0))
    ends: list[torch.Tensor] = []
    whole = sample_latents(model, labels, noise, guided, lambda result: ends.append(result.y))
    for count in (1, 2):
        known = [Known.given(end) for end in ends[:count]]
        assert torch.allclose(sample_latents(model, labels, noise, guided, known=known), whole, atol=1e-5)
