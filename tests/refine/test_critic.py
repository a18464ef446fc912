"""Choosing among candidates: the critic's ratio, the choice, and both in the pipeline and on the command line."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ecar.cli.main import main
from ecar.cost.flops import sampling_flops
from ecar.pretrained.folders import bundled_models, resolve_model, weights_fingerprint
from ecar.refine import BestOf, Critic, accepts, choose, critic_of, fit_critic, load_critic
from ecar.refine.critic import Features
from ecar.sampling.noise import candidate_seeds, draw_choices
from ecar.sampling.pictures import from_pil
from ecar.sampling.pipeline import Pipeline
from ecar.training import loop
from ecar.training.config import TrainConfig


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a critic of arbitrary weights."""
    folder = tmp_path_factory.mktemp("models") / "fashion"
    shutil.copytree(resolve_model("fashion"), folder)
    critic(folder).save(folder / "critic.safetensors")
    return folder


def critic(model: Path, **about: object) -> Critic:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(11, 1280, generator=generator),
        "bias": torch.randn(11, generator=generator),
        "quantiles": torch.randn(11, 64, generator=generator).mul(8).sort(1).values,
    }
    settings = json.loads(json.dumps(Pipeline.from_pretrained(model).settings().to_json()))
    what = {"weights": weights_fingerprint(model), "settings": settings, "power": 1.0}
    return Critic(Features(), tensors, what | about).eval()


def noise_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_fit_finds_the_ratio_of_two_gaussians_that_depends_on_the_class() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20_000) % 2
    shift = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[labels]
    fake = torch.randn(20_000, 3, generator=generator) * torch.tensor([1.0, 1.1, 0.9])
    real = torch.randn(20_000, 3, generator=generator) * torch.tensor([1.0, 1.1, 0.9]) + shift
    fit = fit_critic(real, labels, fake, labels, 2)
    model = Critic.__new__(Critic)
    torch.nn.Module.__init__(model)
    for name, tensor in fit.tensors.items():
        model.register_buffer(name, tensor)
    found = model.of_features(fake, labels)
    true = torch.where(labels == 0, fake[:, 0] - 0.5, (fake[:, 1] - 0.5) / 1.21)
    assert torch.corrcoef(torch.stack([found, true]))[0, 1] > 0.99
    assert (found - true).abs().mean() < 0.15
    assert abs(fit.accuracy - 0.68) < 0.03  # of two normals one deviation apart: 0.69; 0.91 apart: 0.675


@pytest.mark.parametrize("classes", [0, 500])
def test_no_classes_and_very_many_have_one_critic_for_all(classes: int, tmp_path: Path) -> None:
    """A weight per class and direction would take gigabytes for a thousand classes, and none has the images for it."""
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(2, 4000, 5, generator=generator), torch.arange(4000) % max(1, classes)
    fake, real = torch.nn.functional.pad(noise[0], (0, 1275)), torch.nn.functional.pad(noise[1] + 0.8, (0, 1275))
    fit = fit_critic(real, labels, fake, labels, classes)
    assert fit.tensors["weight"].shape == (1, 1280) and fit.accuracy > 0.75
    Critic(Features(), fit.tensors, {"power": 1.0}).save(tmp_path / "c.safetensors")
    again = load_critic(tmp_path / "c.safetensors")
    assert again.of_features(real, labels).mean() > 1 > -1 > again.of_features(fake, labels).mean()


def test_candidates_lead_from_the_model_to_the_real_distribution() -> None:
    """Of N(0, 1) chosen by the ratio to N(1, 1): the mean goes to 1 with the number of candidates."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for count in (1, 4, 64):
        x = torch.randn(20_000, count, generator=generator)
        pick = choose(x - 0.5, torch.rand(20_000, count, generator=generator), 1.0)
        means.append(float(x.gather(1, pick[:, None]).mean()))
    assert abs(means[0]) < 0.02 < means[1] < means[2]
    assert abs(means[2] - 1) < 0.05


def test_the_choice_is_in_proportion_to_the_ratio_and_its_power() -> None:
    ratio, uniform = (
        torch.tensor([[1.0, 2.0]]).log().expand(30_000, 2),
        torch.rand(30_000, 2, generator=torch.Generator().manual_seed(0)),
    )
    for power, share in ((1.0, 2 / 3), (2.0, 4 / 5)):
        assert abs(float(choose(ratio, uniform, power).double().mean()) - share) < 0.01


def test_the_share_that_is_accepted_is_the_one_asked_for_in_every_class_and_the_best_are_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20_000) % 2
    fake = torch.randn(20_000, 3, generator=generator)
    real = fake + torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])[labels]
    fit = fit_critic(real, labels, fake, labels, 2)
    told = Critic(Features(), fit.tensors, {"power": 2.0})
    scores, uniform = told.of_features(fake, labels), torch.rand(20_000, generator=generator)
    for share in (0.05, 0.5, 0.9):
        good = accepts(scores, told.levels(labels, share), uniform, 2.0)
        for name in (0, 1):
            assert abs(float(good[labels == name].float().mean()) - share) < 0.015
        assert scores[good].mean() > scores[~good].mean() + 0.5


def test_acceptance_gives_what_rejection_sampling_does_and_an_image_is_the_same_in_any_batch(fashion: Path) -> None:
    """By hand: candidates one after the other, each accepted or not; after the last, one of all."""
    pipe = Pipeline.from_pretrained(fashion)
    labels, seeds, most = [0, 1, 2, 3, 4, 5, 6, 7], range(8), 3
    best = BestOf(pipe, critic_of(fashion), candidates=most, acceptance=0.4)
    whole = best(labels, seeds=seeds)
    alone = [best([n], seeds=[s]) for n, s in zip(labels, seeds, strict=True)]
    assert whole.chosen == [a.chosen[0] for a in alone] and whole.drawn == [a.drawn[0] for a in alone]
    expected, drawn = [], []
    for label, seed in zip(labels, seeds, strict=True):
        own, uniform = candidate_seeds(seed, most), draw_choices([seed], 2 * most)[0]
        images = from_pil(pipe([label] * most, seeds=own).images)
        scores, level = (
            best.critic(images, torch.tensor([label] * most)),
            best.critic.levels(torch.tensor([label]), 0.4),
        )
        good = accepts(scores, level.repeat(most), uniform[most:], 1.0).tolist()
        last = good.index(True) if any(good) else most - 1
        pick = last if any(good) else int(choose(scores[None], uniform[None, :most], 1.0))
        expected.append(own[pick])
        drawn.append(last + 1)
    assert (whole.chosen, whole.drawn) == (expected, drawn) and len(set(drawn)) == most
    assert [c != s for c, s in zip(whole.chosen, seeds, strict=True)].count(True) >= 3
    again = pipe(labels, seeds=whole.chosen)
    for one, other in zip(whole.images, again.images, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_candidates_of_neighbouring_seeds_share_nothing() -> None:
    seeds = [seed for start in (0, 1, 2, 2**53 - 1) for seed in candidate_seeds(start, 64)]
    assert len(set(seeds)) == len(seeds) and candidate_seeds(5, 3)[0] == 5
    assert all(0 <= seed < 2**53 for seed in seeds)
    draws = draw_choices([0, 1, 2**53 - 1], 4)
    assert draws.shape == (3, 4) and len(draws.unique()) == 12


def test_a_critic_survives_saving_and_damaged_files_are_refused(fashion: Path, tmp_path: Path) -> None:
    images, labels = noise_images(3), torch.tensor([0, 9, 10])  # the last: no class
    model = critic(fashion)
    model.save(tmp_path / "c.safetensors")
    again = load_critic(tmp_path / "c.safetensors")
    assert torch.equal(model(images, labels), again(images, labels)) and again.about == model.about
    plain = model.of_features(model.features(images), torch.full((3,), 10))
    assert torch.equal(plain[2], again(images, labels)[2]) and not torch.equal(plain[0], again(images, labels)[0])
    save_file({"bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:500])
    for name in ("other", "cut", "none"):
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            load_critic(tmp_path / f"{name}.safetensors")


def test_an_image_is_the_same_alone_in_a_batch_and_by_the_seed_that_was_chosen(fashion: Path) -> None:
    warnings.simplefilter("error")  # none about the critic's settings, which are the model's
    pipe, labels, seeds = Pipeline.from_pretrained(fashion), [0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]
    best = BestOf(pipe, critic_of(fashion), candidates=3)
    together = best(labels, seeds=seeds)
    plain = pipe(labels, seeds=seeds)
    assert together.seeds == seeds and plain.chosen == seeds
    assert together.chosen != seeds and all(
        c in candidate_seeds(s, 3) for c, s in zip(together.chosen, seeds, strict=True)
    )
    again = pipe(labels, seeds=together.chosen, return_stages=True)
    cut = best(labels, seeds=seeds, batch_size=4, return_stages=True)
    alone = best(labels[2:3], seeds=seeds[2:3])
    assert cut.chosen == together.chosen and alone.chosen == together.chosen[2:3]
    for number, image in enumerate(together.images):
        for other in (again.images[number], cut.images[number], cut.stages[-1][number], again.stages[-1][number]):
            assert np.abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1
    assert len(cut.stages[0]) == len(labels)


def test_candidates_without_a_critic_or_with_one_of_another_model_are_refused(fashion: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(fashion, plain, ignore=shutil.ignore_patterns("critic.safetensors"))
    with pytest.raises(ValueError, match="plain has no critic"):
        critic_of(plain)
    pipe, given = Pipeline.from_pretrained(fashion), critic_of(fashion)
    critic(fashion, weights="0123").save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="made for the model with weights 0123"):
        critic_of(fashion, tmp_path / "c.safetensors")
    pipe.adapter = "lora/adapter"
    with pytest.raises(ValueError, match="not those with an adapter"):
        BestOf(pipe, given)
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=r"candidates must be in 1\.\.64"):
            BestOf(Pipeline.from_pretrained(fashion), given, candidates=wrong)


def test_bundled_critics_are_of_the_bundled_weights_and_settings() -> None:
    found = [name for name in bundled_models() if (resolve_model(name) / "critic.safetensors").exists()]
    assert {"cifar10", "fashion"} <= set(found)
    warnings.simplefilter("error")
    for name in found:
        pipe = Pipeline.from_pretrained(name)
        assert len(BestOf(pipe, critic_of(name), candidates=2, acceptance=0.5)([0]).images) == 1


def test_other_settings_than_the_critic_knows_are_warned_of(fashion: Path) -> None:
    pipe = Pipeline.from_pretrained(fashion)
    with pytest.warns(UserWarning, match="the critic was made for samples with"):
        BestOf(pipe, critic_of(fashion), candidates=2)([0], steps=2)


def test_flops_count_every_candidate_and_the_critic(fashion: Path) -> None:
    pipe = Pipeline.from_pretrained(fashion)
    one, three = sampling_flops(pipe, pipe.settings()), sampling_flops(pipe, pipe.settings(), 3, critic_of(fashion))
    assert three["model"] == 3 * one["model"] and three["decoder"] == 3 * one["decoder"]
    assert three["total"] == three["model"] + three["decoder"] + three["critic"]
    assert 3e8 < three["critic"] < 1.5e9  # 860 million products at 260 pixels, so 0.23 GFLOP at 96, three times


def test_the_command_makes_a_critic_that_sample_and_evaluate_use(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.of(
        data=str(digits_folder), out=str(tmp_path / "run"), tokenizer="pixels:2", resolution=(8,),
        preset="16x2x1+1", max_steps=2, batch_size=8, dtype="fp32", device="cpu",
    )  # fmt: skip
    model, file = str(loop.train(config)), tmp_path / "critic.safetensors"
    make = ["critic", model, "--data", str(digits_folder), "--num", "120", "--device", "cpu", "--out", str(file)]
    assert main(make) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["images"] == 120 and made["accuracy"] > 0.8 and made["model"] == ""  # two steps: its samples are noise
    shutil.copy(file, Path(model) / "critic.safetensors")
    out = tmp_path / "s.npz"
    assert main(["sample", model, "--per-class", "2", "--candidates", "3", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["candidates"] == 3
    judge = ["evaluate", "--model", model, "--data", str(digits_folder), "--num", "30", "--allow-small", "--cache"]
    judge += [str(tmp_path / "cache"), "--split", "train", "--candidates", "2", "--out", str(tmp_path / "e.json")]
    assert main(judge) == 0
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["candidates"] == 2 and record["critic"] and record["flops_per_image"]["critic"] > 0
    assert main([*judge, "--seed", "1"]) == 2  # other samples than those in the folder
    judge[-1] = str(tmp_path / "accepted.json")
    assert main([*judge, "--acceptance", "0.6"]) == 0
    record = json.loads((tmp_path / "accepted.json").read_text())
    one = sampling_flops(Pipeline.from_pretrained(model), Pipeline.from_pretrained(model).settings())["model"]
    assert 1 < record["candidates_drawn"] < 2 and record["acceptance"] == 0.6
    assert record["flops_per_image"]["model"] == pytest.approx(record["candidates_drawn"] * one, rel=1e-4)
    capsys.readouterr()
    args = ["sample", model, "--per-class", "2", "--candidates", "8", "--acceptance", "0.5", "--out", str(out)]
    assert main(args) == 0 and 6 < json.loads(capsys.readouterr().out.splitlines()[-1])["drawn"] < 40


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["sample", "fashion", "--critic", "c.safetensors"], "--critic chooses among candidates"),
        (["sample", "fashion", "--critic", "nothing.safetensors", "--candidates", "2"], "no such file"),
        (["sample", "cifar10", "--acceptance", "1", "--candidates", "2"], "--acceptance must be between 0 and 1"),
        (["sample", "cifar10", "--acceptance", "nan", "--candidates", "2"], "--acceptance must be between 0 and 1"),
        (["sample", "cifar10", "--acceptance", "0.5"], "--acceptance needs --candidates 2 or more"),
        (["critic", "fashion", "--data", "nowhere", "--num", "99"], "--num must be at least 100"),
        (["critic", "fashion", "--data", "nowhere", "--power", "0"], "--power must be above 0"),
        (["critic", "fashion", "--data", "nowhere", "--out", "c.bin"], "must end in .safetensors"),
        (["critic", "nothing", "--data", "nowhere"], "model 'nothing' not found"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and "\n" not in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10", "fashion"])
def test_a_bundled_critic_is_of_its_models_weights_and_default_settings(name: str) -> None:
    """Rewritten configurations left critics behind that warned of other settings."""
    model = resolve_model(name)
    about, settings = load_critic(model / "critic.safetensors").about, Pipeline.from_pretrained(model).settings()
    assert about["weights"] == weights_fingerprint(model)
    assert about["settings"] == json.loads(json.dumps(settings.to_json()))
