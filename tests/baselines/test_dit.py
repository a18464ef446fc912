"""The baseline is diffusers' network, trained and sampled by the same code as ECAR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ecar.baselines.dit import TIME_SCALE, DiT
from ecar.config import ModelConfig, SamplingConfig, StageConfig
from ecar.network.presets import PRESETS, preset_config
from ecar.pretrained.build import build_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.sampling.pipeline import Pipeline
from ecar.training import loop
from ecar.training.config import TrainConfig
from ecar.training.loss import Draws, stage_losses
from timing import shared_embedder_parameters


def dit_config(**changes: object) -> ModelConfig:
    base = ModelConfig(
        kind="dit",
        stages=StageConfig(sides=((4, 4),), ends=(1.0,)),
        channels=3,
        width=16,
        heads=2,
        trunk_depth=0,
        head_depth=2,
        num_classes=3,
        context_noise=0.0,
        image_side=(8, 8),
    )
    return base.replace(**changes)


def dit(**changes: object) -> DiT:
    torch.manual_seed(0)
    model = build_model(dit_config(**changes))
    assert isinstance(model, DiT)
    for parameter in model.parameters():  # fill what starts at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_loss_is_flow_matching_of_the_diffusers_network() -> None:
    model, z, labels = dit(), torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
    noise, times = torch.randn(4, 3, 4, 4), torch.rand(1, 4)
    t = times[0].view(-1, 1, 1, 1)
    v = model.head.network((1 - t) * noise + t * z, TIME_SCALE * times[0], labels, return_dict=False)[0]
    expected = (v - (z - noise)).square().mean((1, 2, 3))
    found = stage_losses(model, z, labels, Draws([noise], [], times), (4,))[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_guided_samples_are_euler_on_the_diffusers_network() -> None:
    model, labels = dit(), torch.tensor([0, 2])
    noise, null = draw_noise([5, 6], model.plan, 3), torch.tensor([3, 3])
    settings = SamplingConfig(steps=(3,), guidance=(2.0,), solver="euler")
    x = noise[0].fresh
    with torch.no_grad():
        for i in range(3):
            t = torch.full((2,), TIME_SCALE * i / 3)
            cond, uncond = (model.head.network(x, t, c, return_dict=False)[0] for c in (labels, null))
            x = x + (uncond + 2 * (cond - uncond)) / 3
    assert torch.allclose(sample_latents(model, labels, noise, settings), x, atol=1e-5)


def test_training_mode_drops_no_labels_of_its_own() -> None:
    """diffusers' embedders would drop a tenth again, from the global generator."""
    model = dit().train()
    x, t, labels = torch.randn(64, 3, 4, 4), torch.rand(64), torch.zeros(64, dtype=torch.int64)
    first, second = (model.head.network(x, t, labels, return_dict=False)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_embedders_count_once_in_the_papers_count() -> None:
    model = dit()
    embedder = sum(p.numel() for p in model.head.blocks[0].norm1.emb.parameters())
    assert model.num_parameters() - shared_embedder_parameters(model) == embedder


@pytest.mark.parametrize("preset", PRESETS)
def test_both_systems_of_a_preset_have_the_same_parameters_within_5_percent(preset: str) -> None:
    """As DiT's paper counts: one embedder of time and class."""
    sizes: dict[str, Any] = {"latent": (32, 32), "channels": 4, "classes": 1000, "image": (256, 256)}
    with torch.device("meta"):
        ecar = build_model(preset_config(preset, stages=3, **sizes))
        peer = build_model(preset_config(f"dit-{preset}/2", stages=1, **sizes))
    assert ecar.num_parameters() == pytest.approx(shared_embedder_parameters(peer), rel=0.05)


def test_patches_make_fewer_tokens_and_keep_the_shape() -> None:
    model = dit(patch=2)
    assert model.head.network.pos_embed.pos_embed.shape[1] == 4
    noise = draw_noise([0], model.plan, 3)
    out = sample_latents(model, torch.tensor([1]), noise, SamplingConfig(steps=(2,), guidance=(1.0,)))
    assert out.shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stages": StageConfig(sides=((2, 2), (4, 4)), ends=(0.8, 1.0))}, "one stage"),
        ({"stages": StageConfig(sides=((4, 8),), ends=(1.0,))}, "square"),
        ({"num_classes": 0}, "classes"),
    ],
)
def test_what_dit_cannot_do_is_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build_model(dit_config(**changes))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_trains_saves_loads_and_samples(digits_folder: Path, tmp_path: Path, optimizer: str) -> None:
    config = TrainConfig.of(
        data=str(digits_folder), out=str(tmp_path), tokenizer="pixels:2", resolution=(8,),
        preset="dit-16x2x0+1", max_steps=4, batch_size=8, save_every=2,
        dtype="fp32", optimizer=optimizer, device="cpu",
    )  # fmt: skip
    pipe = Pipeline.from_pretrained(loop.train(config), device="cpu")
    assert isinstance(pipe.model, DiT)
    assert pipe(["seven"], steps=2, guidance=1.5).images[0].size == (8, 8)


def test_stage_options_are_refused_for_dit() -> None:
    with pytest.raises(ValueError, match="one stage"):
        TrainConfig.of(data="x", out="y", preset="dit-ti", stages=2)


@pytest.mark.slow
def test_compiled_blocks_have_the_gradients_of_plain_ones_in_bfloat16_on_cpu() -> None:
    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model = dit(head_depth=1, width=64, stages=StageConfig(sides=((8, 8),), ends=(1.0,)), image_side=(8, 8)).train()
        with torch.no_grad():
            for parameter in model.parameters():  # at its start a block is the identity
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        if compiled:
            model.compile_blocks()
        x, labels, t, stage = torch.randn(16, 3, 8, 8), torch.arange(16) % 4, torch.rand(16), model.plan[0]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.head.embed_tokens(stage, model.trunk([], labels)[0])
            model.velocity(stage, x, t, tokens, labels).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, compiled = gradients(False), gradients(True)
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        assert (compiled[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-4, name


def test_sampling_compiles_whole_blocks_as_ecar_does() -> None:
    model = dit().eval()
    model.compile_blocks()  # lazily: nothing is compiled yet
    assert all(block._compiled_call_impl is not None for block in model.head.blocks)
