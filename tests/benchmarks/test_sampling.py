"""ECAR against DiT: both sides run, clocks come off again, FLOPs are those that are computed, ratios follow."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import common
import sampling
from conftest import tiny_config
from ecar.config import SamplingConfig, StageConfig
from ecar.cost.flops import flop_counter
from ecar.network.presets import preset_config
from ecar.pretrained.build import build_model
from ecar.sampling.graphs import GraphedHead, graph_head
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from timing import compare, decoder_cost, flops_per_image, make_side

TINY = ["--preset", "nano", "--resolution", "32", "--factor", "4", "--peer-factor", "4", "--peer-patch", "1"]
TINY += ["--classes", "10", "--channels", "4", "--stages", "2", "--batch", "1", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the real size take longer than all else here."""
    monkeypatch.setattr(sampling, "matmul_peak", functools.partial(common.matmul_peak, size=256))


def record_of(tmp_path: Path, *more: str) -> dict[str, Any]:
    """What the benchmark wrote."""
    few = [] if "--peer-steps" in more else ["--peer-steps", "4", "2"]
    sampling.main([*TINY, *few, *more, "--out", str(tmp_path / "bench.json")])
    record: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    return record


def test_record_holds_both_sides_and_ratios_follow_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--peer-steps", "6", "3", "--peer-run-steps", "2", "--curve", "6+3", "--decoder", "tiny", "--repeats", "1"]
    record = record_of(tmp_path, *more)
    assert record == json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(r["batch"], tuple(r["ecar_steps"]), r["dit_steps"]) for r in record["ratios"]]
    assert rows == [(1, ours, theirs) for ours in ((8, 4), (6, 3)) for theirs in (6, 3)]
    flops, ratio = record["flops_per_image"], record["ratios"][0]
    assert flops["dit 6 steps"]["total"] == 2 * flops["dit 3 steps"]["total"]
    assert ratio["fewer_flops"] == round(flops["dit 6 steps"]["total"] / flops["ecar"]["total"], 2)
    first = record["measured"][0]
    assert first["dit"]["steps_run"] == [2] and first["ecar"]["steps_run"] == first["ecar"]["steps"]
    assert ratio["both_sides"] == "eager" and first["ecar"]["batch"] == 1
    seconds = {name: first[name]["seconds_per_batch"] for name in ("ecar", "dit")}
    assert ratio["less_time"] == pytest.approx(seconds["dit"] / seconds["ecar"], abs=0.01)
    assert {"trunk 1", "trunk 2", "head 1", "head 2", "rest"} == set(first["ecar"]["split_seconds"])
    assert [row["resolution"] for row in record["by_resolution"]["ecar"]["rows"]] == [32, 64, 128]
    assert record["by_resolution"]["ecar"]["rows"][0]["total_flops"] == flops["ecar"]["total"]
    decoders = record["decoder"]["batch 1"]
    whole = {name: flops[side]["total"] + decoders[name]["flops_per_image"]
             for name, side in (("ecar", "ecar"), ("dit", "dit 6 steps"))}  # fmt: skip
    assert ratio["fewer_flops_with_decoder"] == round(whole["dit"] / whole["ecar"], 2) < ratio["fewer_flops"]
    seconds = {name: seconds[name] + decoders[name]["seconds_per_batch"] for name in seconds}
    assert ratio["less_time_with_decoder"] == pytest.approx(seconds["dit"] / seconds["ecar"], abs=0.006)


@pytest.mark.parametrize(("kind", "stages"), [("ecar", 2), ("dit", 1)])
def test_flops_of_a_side_are_those_that_it_computes(kind: str, stages: int) -> None:
    """Both sides are compared by closed formulas: each agrees with the counter within 1%."""
    sizes = {"latent": (8, 8), "classes": 10, "channels": 4, "image": (32, 32)}
    settings = SamplingConfig(steps=(3, 2)[:stages], guidance=(1.5, 1.0)[:stages])
    config = preset_config("dit-nano" if kind == "dit" else "nano", stages=stages, **sizes)
    side = make_side(kind, config, settings, dtype=torch.float32, device="cpu")
    noise = draw_noise([0], side.model.plan, 4)
    with torch.no_grad(), flop_counter() as counter:
        sample_latents(side.model, torch.tensor([1]), noise, settings)
    formula = flops_per_image(side.model.config, settings)["total"]
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_distilled_model_takes_one_pass_a_step_and_dit_keeps_its_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flops = []
    for more in ([], ["--distilled"], ["--no-guidance"], ["--guide-last"]):
        totals = record_of(tmp_path, "--peer-steps", "2", "--repeats", "0", *more)["flops_per_image"]
        assert ("ECAR (distilled)" in capsys.readouterr().out) == ("--distilled" in more)
        flops.append((totals["ecar"]["total"], totals["dit 2 steps"]["total"]))
    guided, distilled, plain, everywhere = flops
    assert everywhere[0] > guided[0] and everywhere[1] == guided[1]
    assert distilled[0] == plain[0] < guided[0] and distilled[1] == guided[1] > plain[1]


def test_another_split_of_the_depth_keeps_the_size_and_makes_each_step_cost_more(tmp_path: Path) -> None:
    trunk_heavy, head_heavy = (
        record_of(tmp_path, "--repeats", "0", "--preset", f"192x6x{trunk}+{7 - trunk}") for trunk in (5, 2)
    )
    assert trunk_heavy["parameters"] == head_heavy["parameters"]
    assert trunk_heavy["flops_per_image"]["ecar"]["total"] < head_heavy["flops_per_image"]["ecar"]["total"]
    for record in (trunk_heavy, head_heavy):
        assert record["by_resolution"]["ecar"]["rows"][0]["total_flops"] == record["flops_per_image"]["ecar"]["total"]


def test_without_repeats_no_weight_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XL's splits are compared in seconds, on any machine."""
    monkeypatch.setattr(sampling, "make_side", lambda *_, **__: pytest.fail("weights were made"))
    record = record_of(tmp_path, "--repeats", "0")
    sizes = {"latent": (8, 8), "classes": 10, "channels": 4, "image": (32, 32)}
    for kind, stages in (("ecar", 2), ("dit", 1)):
        model = build_model(preset_config("dit-nano" if kind == "dit" else "nano", stages=stages, **sizes))
        assert record["parameters"][kind] == model.num_parameters()
    assert record["measured"] == [] and "less_time" not in record["ratios"][0]


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_decoder_makes_images_of_the_asked_resolution_and_is_counted(kind: str) -> None:
    settings = SamplingConfig(steps=(1, 1), guidance=(1.0, 1.0))
    config = tiny_config(stages=StageConfig(sides=((4, 4), (8, 8)), ends=(0.6, 1.0)), velocity_std=(), sampling=None)
    side = make_side("x", config, settings, dtype=torch.float32, device="cpu")
    cost = decoder_cost(kind, side, 1, 32)
    assert cost["flops_per_image"] > 1e6 and cost["seconds_per_batch"] > 0


def test_clocks_come_off_but_leave_the_replay_of_graphs_in_place() -> None:
    """They took it off: from the second batch size on, "graphs" was timed without any."""
    settings = SamplingConfig(steps=(1, 1, 1), guidance=(1.0, 1.0, 1.0))
    side = make_side("x", tiny_config(), settings, dtype=torch.float32, device="cpu")
    assert all(bool(p.any()) for p in side.model.parameters())
    compare([side], 2, 1)
    assert "forward" not in vars(side.model.head) and "step" not in vars(side.model.trunk)
    graph_head(side.model, lambda run: (lambda: None, run()))
    for batch in (1, 2):
        compare([side], batch, 1)
        assert isinstance(side.model.head.forward, GraphedHead)


def test_a_single_stage_is_guided_as_dit_is(tmp_path: Path) -> None:
    guided, plain = (
        sum(record_of(tmp_path, "--stages", "1", "--repeats", "0", *more)["flops_per_image"]["ecar"]["head"])
        for more in ([], ["--no-guidance"])
    )
    assert guided > 1.9 * plain


def test_missing_tools_are_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """g++ was missed after minutes, matplotlib after all measurements."""
    monkeypatch.setattr(sampling, "find_spec", lambda _: None)
    monkeypatch.setattr(sampling.shutil, "which", lambda _: None)
    for wanted, word in ((["--plot", "cost.png"], "matplotlib"), (["--optimized", "--device", "cpu"], "g++")):
        with pytest.raises(SystemExit) as stop:
            sampling.main(wanted)
        assert stop.value.code == 2 and word in capsys.readouterr().err


def test_default_steps_of_larger_images_are_those_of_their_stages(tmp_path: Path) -> None:
    """From one stage on they were 8 + 8 + 8: taken for one number that stands for all."""
    rows = record_of(tmp_path, "--stages", "1", "--repeats", "0")["by_resolution"]["ecar"]["rows"]
    assert [row["steps"] for row in rows] == [[8], [8, 4], [8, 4, 4]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--cuda-graphs", "--device", "cpu"], "needs a CUDA device"),
        (["--decoder", "vq"], "none, kl or tiny"),
        (["--batch", "0"], "at least 1"),
        (["--factor", "0"], "--factor"),
        (["--resolution", "250"], "divide"),
        (["--curve", "8+4"], "such as 6+3+3"),
        (["--resolution", "0"], "at least 1"),
        (["--stages", "0", "--curve", "x"], "at least 1"),
        (["--factor", "12", "--resolution", "96", "--peer-factor", "12", "--decoder", "tiny"], "power of two"),
        (["--distilled", "--guide-last"], "takes no guidance pass"),
        (["--no-guidance", "--distilled"], "leaves nothing to --distilled"),
        (["--repeats", "0", "--decoder", "kl"], "measures nothing"),
    ],
)
def test_wrong_input_exits_with_2(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sampling.main(arguments)
    assert stop.value.code == 2 and word in capsys.readouterr().err
