"""Distillation: the targets by hand, a student that does in one pass what the teacher does in two, resume, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from test_finetune import saved, tuned
from test_processes import job
from test_training import draws, killed_at_five, lines, weights

from conftest import random_model, tiny_config
from ecar.config import SamplingConfig
from ecar.files.options import changed, flat
from ecar.pretrained.folders import load_model, save_model
from ecar.sampling.pipeline import Pipeline
from ecar.sampling.solvers import uniform_grid
from ecar.stages import interpolate, noises, pyramid
from ecar.training import loop
from ecar.training.config import TrainConfig
from ecar.training.distill import Teacher, check_distill, grid_times
from ecar.training.finetune import Source
from ecar.training.loss import stage_losses

ROWS = (6, 4, 2)
GUIDANCE, STARTS = (3.0, 1.0, 2.0), (0.4, 0.0, 0.0)


@pytest.fixture
def data(digits_folder: Path, tmp_path: Path) -> Path:
    """Digits under the teacher's class names."""
    for old, new in (("zero", "ZERO"), ("one", "one"), ("seven", "cat")):
        shutil.copytree(digits_folder / old, tmp_path / "data" / new)
    return tmp_path / "data"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sampling = SamplingConfig(steps=(3, 2), guidance=(1.0, 20.0), solver="ab2")
    return saved(tmp_path / "source", sampling=sampling)


def student(data: Path, out: Path, source: Path, **changes: Any) -> TrainConfig:
    return tuned(data, out, source, **{"distill": (), **changes})


@pytest.mark.parametrize("steps", [(), (4, 2, 3)])
def test_the_target_is_the_guided_velocity_or_the_midpoint_step_of_it_by_hand(
    steps: tuple[int, ...],
) -> None:
    """Row by row, without batches: the second row is of the null class, the first stage is guided from 0.4 on."""
    model, theirs = random_model(tiny_config(context_noise=0.0)), random_model(tiny_config(context_noise=0.0), seed=1)
    z, labels = torch.randn(6, 3, 8, 12, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 3, 2, 1, 0, 1])
    d = draws(model.plan, 6)
    if steps:
        d = type(d)(d.noise, d.context, grid_times(steps, model.plan, 6, torch.Generator().manual_seed(0)))
    teacher = Teacher(theirs, GUIDANCE, STARTS, steps)
    losses = stage_losses(model, z, labels, d, ROWS, teacher)
    maps, noise = pyramid(z, 3), noises(model.plan, d.noise)
    ends = [s.end * y + (1 - s.end) * n for s, y, n in zip(model.plan[:-1], maps, noise, strict=False)]
    for stage in model.plan:
        k = stage.index
        for row in range(ROWS[k]):
            one, label = slice(row, row + 1), labels[row : row + 1]

            def velocity(m: Any, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor, k: int = k, one: slice = one):  # type: ignore[no-untyped-def]
                tokens = m.trunk([y[one] for y in ends[:k]], label)[k]
                return m.velocity(m.plan[k], x, t, m.head.embed_tokens(m.plan[k], tokens), label)

            def guided(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor = label, k: int = k) -> torch.Tensor:
                v, null = velocity(theirs, x, t, label), torch.tensor([3])
                if t.item() < STARTS[k] - 1e-6:
                    return v
                return velocity(theirs, x, t, null) * (1 - GUIDANCE[k]) + GUIDANCE[k] * v

            t = d.times[k, one]
            x = interpolate(stage, maps[k][one], noise[k][one], t).x
            target = guided(x, t)
            if steps and t.item() < 1:
                target = guided(x + target / (2 * steps[k]), t + 1 / (2 * steps[k]))
            error = (velocity(model, x, t, label) - target) / model.velocity_scale(stage)
            assert losses[k][row].item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_a_student_that_is_its_unguided_teacher_has_nothing_to_learn_and_gradients_reach_the_student_alone() -> None:
    model, theirs = random_model(tiny_config()), random_model(tiny_config())
    z, labels, d = torch.randn(6, 3, 8, 12), torch.tensor([0, 3, 2, 1, 0, 1]), draws(model.plan, 6)
    with torch.autocast("cpu", torch.bfloat16):
        same = stage_losses(model, z, labels, d, ROWS, Teacher(theirs, (1.0,) * 3, (0.0,) * 3))
        assert max(loss.max().item() for loss in same) < 1e-5
        other = stage_losses(model, z, labels, d, ROWS, Teacher(theirs, GUIDANCE, STARTS))
    sum(loss.mean() for loss in other).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in theirs.parameters())


def test_of_a_teacher_that_takes_euler_steps_two_are_learned_as_one() -> None:
    """Its output is a mean over its own step already: the second half alone would be learned by a midpoint step."""
    theirs, stage = random_model(tiny_config()), random_model(tiny_config()).plan[1]
    teacher = Teacher(theirs, (1.0,) * 3, (0.0,) * 3, steps=(2, 2, 2), halving=True)
    x, labels = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    tokens, t = theirs.trunk([torch.randn(3, 3, 2, 3)], labels)[1], torch.tensor([0.0, 0.5, 1.0])
    with torch.no_grad():
        embedded = theirs.head.embed_tokens(stage, tokens)
        first = theirs.velocity(stage, x, t, embedded, labels)
        second = theirs.velocity(stage, x + 0.25 * first, t + 0.25, embedded, labels)
        target = teacher.target(stage, x, t, labels, tokens, tokens)
    assert torch.allclose(target[:2], (first + second)[:2] / 2, atol=1e-5) and torch.allclose(target[2], first[2])


def test_grid_times_are_those_of_euler_steps_and_the_end_of_a_stage_that_has_previews() -> None:
    plan = random_model(tiny_config()).plan
    times = grid_times((3, 2, 4), plan, 500, torch.Generator().manual_seed(0))
    for k, grid in enumerate((uniform_grid(3), uniform_grid(2), uniform_grid(4)[:-1])):  # the last stage ends at data
        assert sorted(set(times[k].tolist())) == pytest.approx(grid)
    assert torch.equal(times[:2], grid_times((3,), plan, 500, torch.Generator().manual_seed(0))[:2]) is False
    assert set(grid_times((1,), plan, 50, torch.Generator()).flatten().tolist()) == {0.0, 1.0}


def pictures(folder: Path, **settings: Any) -> torch.Tensor:
    """Latents of twelve images."""
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    images = pipe(["cat", "ZERO", "one"] * 4, seeds=list(range(12)), settings=pipe.settings(**settings)).images
    return torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float() for i in images])


@pytest.mark.slow
def test_a_students_unguided_images_come_near_its_teachers_guided_ones(
    data: Path, tmp_path: Path, source: Path
) -> None:
    """Distilled from random weights: what they draw does not matter, who draws like whom does."""
    final = loop.train(student(data, tmp_path / "run", source, max_steps=60, lr=3e-3, batch_size=32, ema=(0.9,)))
    made = Pipeline.from_pretrained(final).model.config.sampling
    assert made == SamplingConfig(steps=(3, 2), guidance=(1.0, 1.0), solver="ab2")
    wanted, plain, learned = pictures(source), pictures(source, guidance=1.0), pictures(final)
    assert (learned - wanted).abs().mean() < 0.7 * (plain - wanted).abs().mean()
    log = lines(tmp_path / "run")
    assert log[-1]["loss"] < 0.3 * log[1]["loss"]


@pytest.mark.slow
def test_a_students_few_euler_steps_come_near_its_teachers_many(data: Path, tmp_path: Path, source: Path) -> None:
    steps = student(
        data,
        tmp_path / "run",
        source,
        max_steps=60,
        lr=3e-3,
        batch_size=32,
        ema=(0.9,),
        distill_steps=(2, 1),
        distill=("1",),
    )
    final = loop.train(steps)
    made = Pipeline.from_pretrained(final).model.config.sampling
    assert made == SamplingConfig(steps=(2, 1), guidance=(1.0, 1.0), solver="euler", fixed_steps=True)
    with pytest.warns(UserWarning, match="distilled for"):
        pictures(final, steps=(4, 2))
    wanted = pictures(source, steps=(8, 8), guidance=1.0)
    plain = pictures(source, steps=(2, 1), guidance=1.0, solver="euler")
    learned = pictures(final)
    assert (learned - wanted).abs().mean() < 0.7 * (plain - wanted).abs().mean()


@pytest.mark.slow
def test_two_processes_and_micro_batches_are_one_and_a_resumed_run_is_the_whole_one(
    data: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"distill": ("2@0.3",), "distill_steps": (2,)}
    loop.train(student(data, tmp_path / "whole", source, **common))
    open_fields = {k: v for k, v in flat(student(data, tmp_path, source)).items() if k not in ("data", "out")}
    two = job(data, tmp_path / "two", **{**open_fields, **common, "device": "cpu", "world": 2, "accumulate": 2})
    worker.start([two], tmp_path)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)
    with killed_at_five(monkeypatch):
        loop.train(student(data, tmp_path / "parts", source, **common))
    loop.train(student(data, tmp_path / "parts", source, **common))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_teacher_that_changed_since_the_run_began_is_refused(
    data: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at_five(monkeypatch):
        loop.train(student(data, tmp_path / "run", source))
    pipe = Pipeline.from_pretrained(source)
    save_model(source, random_model(pipe.model.config, seed=9), pipe.tokenizer)
    with pytest.raises(ValueError, match="no longer the model"):
        loop.train(student(data, tmp_path / "run", source))


def test_a_student_of_fewer_blocks_follows_the_whole_teacher(data: Path, tmp_path: Path, source: Path) -> None:
    """The teacher was built with the student's depth, and silently lost the blocks that the student does not have."""
    run = loop.train(student(data, tmp_path / "run", source, max_steps=1, preset="16x2x1+1"))
    small, whole = (load_model(folder)[0].config for folder in (run, source))
    assert (small.trunk_depth, small.head_depth) == (1, 1) and whole.head_depth == 2
    config = student(data, tmp_path / "run", source, preset="16x2x1+1", device="cpu")
    found = Source.find(config, tmp_path / "new")
    assert found is not None
    theirs = Teacher.load(found.with_defaults(config), found.fingerprint, found.config, small).model
    original = load_model(source)[0]
    assert len(theirs.head.blocks) == 2 and len(theirs.trunk.blocks) == 2
    assert torch.equal(theirs.head.blocks[1].mlp.w_in.weight, original.head.blocks[1].mlp.w_in.weight)


def test_one_number_guides_every_stage_as_everywhere() -> None:
    config = TrainConfig.of(data="d", out="o", init_from="m", distill=("2",))
    assert check_distill(config.distill, tiny_config(), tiny_config())[0] == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="needs classes"):
        check_distill(config.distill, tiny_config(num_classes=0, class_names=()), tiny_config())
    fixed = tiny_config(sampling=SamplingConfig(steps=(4, 4, 2), guidance=(1.0,) * 3, fixed_steps=True))
    half = TrainConfig.of(data="d", out="o", init_from="m", distill=(), distill_steps=(2, 2, 1))
    assert check_distill(half.distill, fixed, fixed)[2] == (2, 2, 1)
    for more in (config, changed(half, distill_steps=(2, 1, 1))):
        with pytest.raises(ValueError, match="only teach half as many"):
            check_distill(more.distill, fixed, fixed)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stages": (0.6, 1.0)}, "own stages"),
        ({"distill": ("1",)}, "nothing to do"),
        ({"distill": ("1", "2", "3")}, "guidance needs"),
        ({"distill": ("2@1",)}, "guidance_from needs"),
        ({"distill": ("2@half",)}, "--distill takes SCALE"),
        ({"distill_steps": (2, 0)}, "steps needs"),
        ({"distill": None, "distill_steps": (2,)}, "needs --distill"),
        ({"init_from": None, "resolution": (8,), "tokenizer": "pixels:2"}, "--init-from"),
    ],
)
def test_what_cannot_be_distilled_is_refused(tmp_path: Path, source: Path, changes: dict[str, Any], word: str) -> None:
    """All of it before images are read."""
    with pytest.raises(ValueError, match=word):
        loop.train(student(tmp_path / "no data here", tmp_path / "run", source, **changes))


def test_classes_and_latents_that_the_teacher_does_not_know_are_refused(
    digits_folder: Path, data: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # before the images are encoded
        patch.setattr("ecar.training.build.encode_source", lambda *_, **__: pytest.fail("images were encoded"))
        with pytest.raises(ValueError, match=r"does not have all classes of the data \(1 of 3: 'seven'\)"):
            loop.train(student(digits_folder, tmp_path / "run", source))
    with pytest.raises(ValueError, match="no labels"):
        loop.train(student(data / "one", tmp_path / "flat", source, distill=("2",)))
    with pytest.raises(ValueError, match="not those that"):
        loop.train(student(data, tmp_path / "other", source, tokenizer="pixels:2"))
    shutil.rmtree(data / "ZERO")  # some of its classes are enough
    assert loop.train(student(data, tmp_path / "some", source, max_steps=1)).exists()
