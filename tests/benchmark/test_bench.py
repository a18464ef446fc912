"""The benchmark measures what it says: both sides run, clocks come off again, ratios follow from the record."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from conftest import tiny_config
from ecar.benchmark.bench import compare, decoder_cost, make_side, matmul_peak, run_once
from ecar.cli.main import main
from ecar.config import SamplingConfig, StageConfig
from ecar.network.presets import preset_config
from ecar.pretrained.build import build_model
from ecar.sampling.graphs import GraphedHead, graph_head

TINY = ["--preset", "nano", "--resolution", "32", "--factor", "4", "--peer-factor", "4", "--peer-patch", "1"]
TINY += ["--classes", "10", "--channels", "4", "--stages", "2", "--batch", "1,2", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the real size take longer than all else here."""
    monkeypatch.setattr("ecar.benchmark.bench.matmul_peak", functools.partial(matmul_peak, size=256))


def test_record_holds_both_sides_and_ratios_follow_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", *TINY, "--peer-steps", "6,3", "--peer-run-steps", "2", "--out", str(out)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert [(r["batch"], r["dit_steps"]) for r in record["ratios"]] == [(1, 6), (1, 3), (2, 6), (2, 3)]
    flops = record["flops_per_image"]
    assert flops["dit 6 steps"]["total"] == 2 * flops["dit 3 steps"]["total"]
    assert record["ratios"][0]["fewer_flops"] == round(flops["dit 6 steps"]["total"] / flops["ecar"]["total"], 2)
    first = record["measured"][0]
    assert first["dit"]["steps_run"] == [2] and first["ecar"]["steps_run"] == first["ecar"]["steps"]
    ratio = first["dit"]["seconds_per_batch"] / first["ecar"]["seconds_per_batch"]
    assert record["ratios"][0]["less_time"] == pytest.approx(ratio, abs=0.01)
    assert first["ecar"]["batch"] == 1 and record["ratios"][0]["both_sides"] == "eager"
    costs = record["by_resolution"]["ecar"]["rows"]
    assert [row["resolution"] for row in costs] == [32, 64, 128]
    assert costs[0]["total_flops"] == flops["ecar"]["total"]
    assert {"trunk 1", "trunk 2", "head 1", "head 2", "rest"} == set(first["ecar"]["split_seconds"])


def test_curve_measures_further_step_counts_of_the_same_model(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", *TINY, "--peer-steps", "4", "--curve", "6+3", "1+1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [tuple(r["ecar_steps"]) for r in record["ratios"]] == [(8, 4), (6, 3), (1, 1)] * 2
    by_flops = [r["fewer_flops"] for r in record["ratios"][:3]]
    assert by_flops == sorted(by_flops) and len(set(by_flops)) == 3
    assert record["measured"][0]["ecar 1+1"]["steps_run"] == [1, 1]


def test_a_distilled_model_takes_one_pass_a_step_and_dit_keeps_its_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flops = []
    for number, more in enumerate(([], ["--distilled"], ["--no-guidance"], ["--guide-last"])):
        out = tmp_path / f"{number}.json"
        common = ["--batch", "1", "--peer-steps", "2", "--repeats", "0", "--out", str(out)]
        assert main(["bench", *TINY, *common, *more]) == 0
        assert ("ECAR (distilled)" in capsys.readouterr().out) == ("--distilled" in more)
        totals = json.loads(out.read_text())["flops_per_image"]
        flops.append((totals["ecar"]["total"], totals["dit 2 steps"]["total"]))
    guided, distilled, plain, everywhere = flops
    assert everywhere[0] > guided[0] and everywhere[1] == guided[1]
    assert distilled[0] == plain[0] < guided[0] and distilled[1] == guided[1] > plain[1]


def test_another_split_of_the_depth_keeps_the_size_and_makes_each_step_cost_more(tmp_path: Path) -> None:
    records = []
    for trunk, head in ((5, 2), (2, 5)):
        out = tmp_path / f"{head}.json"
        split = ["--trunk-depth", str(trunk), "--head-depth", str(head)]
        common = ["--batch", "1", "--peer-steps", "1", "--repeats", "0", "--out", str(out)]
        assert main(["bench", *TINY, *common, *split]) == 0
        records.append(json.loads(out.read_text()))
    trunk_heavy, head_heavy = records
    assert trunk_heavy["parameters"] == head_heavy["parameters"]
    assert trunk_heavy["flops_per_image"]["ecar"]["total"] < head_heavy["flops_per_image"]["ecar"]["total"]
    costs = [record["by_resolution"]["ecar"]["rows"][0]["total_flops"] for record in records]
    assert costs == [record["flops_per_image"]["ecar"]["total"] for record in records]


def test_without_repeats_the_flops_are_those_of_a_timed_run_and_no_weight_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XL's splits are compared in seconds, on any machine."""
    records = []
    for repeats in ("1", "0"):
        out = tmp_path / f"{repeats}.json"
        if repeats == "0":
            monkeypatch.setattr("ecar.benchmark.bench.make_side", lambda *_, **__: pytest.fail("weights were made"))
        assert main(["bench", *TINY, "--batch", "1", "--curve", "6+3", "--repeats", repeats, "--out", str(out)]) == 0
        records.append(json.loads(out.read_text()))
    timed, computed = records
    for key in ("parameters", "flops_per_image", "by_resolution"):
        assert timed[key] == computed[key]
    sizes = {"latent": (8, 8), "classes": 10, "channels": 4, "image": (32, 32)}
    for kind, stages in (("ecar", 2), ("dit", 1)):
        model = build_model(preset_config(kind, "nano", stages=stages, **sizes))
        assert timed["parameters"][kind] == model.num_parameters()
    assert [r["fewer_flops"] for r in computed["ratios"]] == [r["fewer_flops"] for r in timed["ratios"]]
    assert computed["measured"] == [] and "less_time" not in computed["ratios"][0]


def test_decoders_are_in_the_ratios_that_say_so(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", *TINY, "--batch", "1", "--peer-steps", "4", "--decoder", "tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    costs, flops, ratio = record["decoder"]["batch 1"], record["flops_per_image"], record["ratios"][0]
    total = {name: flops[side]["total"] + costs[name]["flops_per_image"]
             for name, side in (("ecar", "ecar"), ("dit", "dit 4 steps"))}  # fmt: skip
    assert ratio["fewer_flops_with_decoder"] == round(total["dit"] / total["ecar"], 2) < ratio["fewer_flops"]
    sides = record["measured"][0]
    seconds = {name: sides[name]["seconds_per_batch"] + costs[name]["seconds_per_batch"] for name in total}
    assert ratio["less_time_with_decoder"] == pytest.approx(seconds["dit"] / seconds["ecar"], abs=0.006)


def test_what_cannot_be_built_is_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolutions came last: minutes of measurements were thrown away by their error."""
    monkeypatch.setattr("ecar.benchmark.bench.compare", lambda *_, **__: pytest.fail("timed"))
    assert main(["bench", *TINY, "--resolution", "40", "--stages", "3", "--out", str(tmp_path / "b.json")]) == 2
    assert "does not divide into 3 stages" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_decoder_makes_images_of_the_asked_resolution_and_is_counted(kind: str) -> None:
    settings = SamplingConfig(steps=(1, 1), guidance=(1.0, 1.0))
    config = tiny_config(stages=StageConfig(sides=((4, 4), (8, 8)), ends=(0.6, 1.0)), velocity_std=(), sampling=None)
    side = make_side("x", config, settings, dtype=torch.float32, device="cpu")
    cost = decoder_cost(kind, side, 1, 32)
    assert cost["flops_per_image"] > 1e6 and cost["seconds_per_batch"] > 0


def test_clocks_come_off_and_zero_layers_are_filled() -> None:
    settings = SamplingConfig(steps=(1, 1, 1), guidance=(1.0, 1.0, 1.0))
    side = make_side("x", tiny_config(), settings, dtype=torch.float32, device="cpu")
    compare([side], 2, 1)
    assert "forward" not in vars(side.model.head) and "step" not in vars(side.model.trunk)
    assert all(bool(p.any()) for p in side.model.parameters())
    assert run_once(side, 1) > 0


def test_clocks_leave_the_replay_of_graphs_in_place() -> None:
    """They took it off: from the second batch size on, "graphs" was timed without any."""
    settings = SamplingConfig(steps=(1, 1, 1), guidance=(1.0, 1.0, 1.0))
    side = make_side("x", tiny_config(), settings, dtype=torch.float32, device="cpu")
    graph_head(side.model, lambda run: (lambda: None, run()))
    for batch in (1, 2):
        compare([side], batch, 1)
        assert isinstance(side.model.head.forward, GraphedHead)


def test_a_single_stage_is_guided_as_dit_is(tmp_path: Path) -> None:
    def head(*more: str) -> int:
        command = ["bench", "--stages", "1", "--preset", "nano", "--resolution", "64", "--repeats", "0", *more]
        assert main([*command, "--out", str(tmp_path / "bench.json")]) == 0
        return int(sum(json.loads((tmp_path / "bench.json").read_text())["flops_per_image"]["ecar"]["head"]))

    assert head() > 1.9 * head("--no-guidance")


def test_missing_tools_are_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """g++ was missed after minutes, matplotlib after all measurements."""
    monkeypatch.setattr("ecar.cli.bench.find_spec", lambda _: None)
    monkeypatch.setattr("ecar.cli.bench.shutil.which", lambda _: None)
    for wanted, word in ((["--plot", "cost.png"], "matplotlib"), (["--optimized", "--device", "cpu"], "g++")):
        assert main(["bench", *wanted]) == 2
        assert word in capsys.readouterr().err


def test_default_steps_of_larger_images_are_those_of_their_stages(tmp_path: Path) -> None:
    """From one stage on they were 8 + 8 + 8: taken for one number that stands for all."""
    out = tmp_path / "bench.json"
    small = ["--preset", "nano", "--resolution", "64", "--batch", "1", "--repeats", "0", "--stages", "1"]
    assert main(["bench", *small, "--no-guidance", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["by_resolution"]["ecar"]["rows"]
    assert [row["steps"] for row in rows] == [[8], [8, 4], [8, 4, 4]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--cuda-graphs", "--device", "cpu"], "needs a CUDA device"),
        (["--decoder", "vq"], "none, kl or tiny"),
        (["--batch", "0"], "at least 1"),
        (["--factor", "0"], "--factor"),
        (["--resolution", "250"], "divide"),
        (["--head-depth", "0"], "--head-depth must be at least 1"),
        (["--curve", "8,4"], "one per stage"),
        (["--curve", "8+4"], "such as 6+3+3"),
        (["--resolution", "0"], "at least 1"),
        (["--stages", "0", "--curve", "x"], "at least 1"),
        (["--batch", "--repeats", "0"], "one number at least"),
        (["--peer-steps"], "one number at least"),
        (["--factor", "12", "--resolution", "96", "--peer-factor", "12", "--decoder", "tiny"], "power of two"),
        (["--distilled", "--guide-last"], "takes no guidance pass"),
        (["--no-guidance", "--distilled"], "leaves nothing to --distilled"),
        (["--repeats", "0", "--decoder", "kl"], "measures nothing"),
    ],
)
def test_wrong_input_exits_with_2(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert word in capsys.readouterr().err
