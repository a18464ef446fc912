"""Curves of quality against cost: what is sampled, counted and compared is what the library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import candidates
import candidates_plot
import compare
import curve
import matched
import seconds
import side_by_side
from conftest import random_model, tiny_config
from ecar.cli.main import main
from ecar.evaluation.samples import Samples
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import PixelTokenizer


def test_a_setting_says_steps_guidance_solver_and_the_time_from_which_it_acts() -> None:
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    settings = curve.parse_setting("3,2,1:1,1.5,2:euler:0.4", pipe)
    assert settings == pipe.settings((3, 2, 1), (1, 1.5, 2), "euler", guidance_from=0.4)
    assert curve.parse_setting("3,2,1", pipe) == pipe.settings((3, 2, 1), 1.0, "ab2", guidance_from=0.0)
    for wrong in ("3,2,1:1.5:ab2:velocity:0.4", "3,2,1:x", ""):
        with pytest.raises(ValueError, match="STEPS"):
            curve.parse_setting(wrong, pipe)


def test_a_curve_is_of_the_decoder_that_was_asked_for() -> None:
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    settings = curve.parse_setting("1,1,1", pipe)
    before = curve.draw(pipe, settings, 4)[0].images.float()
    pipe.decoder = PixelTokenizer(factor=1)
    pipe.decoder.decode = lambda latents: -pipe.tokenizer.decode(latents)  # type: ignore[method-assign]
    assert torch.allclose(curve.draw(pipe, settings, 4)[0].images.float(), 255 - before, atol=1)


def test_a_curve_of_no_model_or_no_decoder_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended with a traceback."""
    files = ["--data", "d", "--train-data", "d", "--classifier", "c", "--out", str(tmp_path / "c.jsonl")]
    for wrong in (["--model", "gone"], ["--model", "fashion", "--decoder", "gone"], ["--model", "fashion"]):
        monkeypatch.setattr("sys.argv", ["curve.py", *wrong, *files, "--settings", "8,4,2"])
        with pytest.raises(SystemExit) as stop:
            curve.main()
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("curve.py: error: ")
        assert ("gone" in error) == ("gone" in wrong)


def test_images_given_to_the_last_stage_are_of_the_classes_of_the_samples_beside_them() -> None:
    """They were a random choice of other classes, and looked worse than free samples where they are better."""
    labels = torch.tensor([2, 0, 1, 1, 0, 0, 2, 1, 0, 0])
    those = curve.one_of_each(labels, 8, 3)
    assert labels[those].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and len(set(those.tolist())) == 8
    with pytest.raises(ValueError, match="as many of each class"):
        curve.one_of_each(labels, 9, 3)


def line(setting: str, weights: str, cost: float, distance: float, accuracy: float, **more: object) -> str:
    record: dict[str, object] = {
        "setting": setting, "FD-EffNetLite0": distance, "classifier_accuracy": accuracy, "weights": weights,
        "num": 1000, "extractor": "e", "reference": "r", "seconds_per_image": cost / 10,
    }  # fmt: skip
    if setting not in ("floor", "reconstruction"):
        record |= {"flops": {"total": cost * 1e9}, "sampling": {"guidance": [1.5 if ":" in setting else 1.0]}}
    return json.dumps(record | more)


def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str, **files: list[str]) -> dict[str, Any]:
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    arguments: list[str] = []
    for side in ("ecar", "dit", "distilled"):
        if own := sorted(str(tmp_path / f"{name}.jsonl") for name in files if name.startswith(side)):
            arguments += [f"--{side}", *own]
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments, "--name", "c", "--out", str(tmp_path), *more])
    compare.main()
    record: dict[str, Any] = json.loads((tmp_path / "c.json").read_text())
    return record


def test_conclusions_follow_from_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting is beaten by one that is no worse and costs no more; two seeds are their mean; accuracy grows."""
    dit = [line("2", "d0", 1, 90, 0.5), line("10", "d0", 4, 50, 0.6), line("10:2", "d0", 8, 45, 0.9)]
    seed = [line("10", "d1", 4, 54, 0.7), line("10:2", "d1", 8, 43, 0.9)]
    ecar = [line("floor", "e0", 0, 20, 0.99), line("4,2", "e0", 1.5, 60, 0.65), line("6,3:2", "e0", 2, 44, 0.8)]
    record = compared(tmp_path, monkeypatch, ecar=ecar, dit0=dit, dit1=seed)
    assert record["dit"]["10"]["FD-EffNetLite0"] == 52 and record["dit"]["10"]["seeds"] == 2
    distance = record["conclusions"]["any"]["FD-EffNetLite0"]
    assert distance["dit_best"]["setting"] == "10:2" and distance["cheapest_ecar_no_worse_than_dit_best"]["gflops"] == 2
    assert distance["dit_settings_beaten_at_no_more_flops"] == ["10", "10:2"]  # nothing is as cheap as "2"
    assert distance["ecar_curve_lies_below"] is False and distance["flops_ratio_to_dit"] == {"2": 0.5, "10": 2.0}
    right = record["conclusions"]["any"]["classifier_accuracy"]
    assert right["dit_best"]["setting"] == "10:2" and right["cheapest_ecar_no_worse_than_dit_best"] is None
    assert right["dit_settings_beaten_at_no_more_flops"] == ["10"]
    unguided = record["conclusions"]["unguided"]["FD-EffNetLite0"]
    assert unguided["cheapest_ecar_no_worse_than_dit_best"] is None and unguided["ecar_best"]["setting"] == "4,2"
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_two_curves_of_one_model_may_both_have_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floor, dit = line("floor", "e", 0, 20, 0.9), [line("2", "d", 1, 90, 0.5)]
    record = compared(
        tmp_path, monkeypatch, dit=dit, ecar0=[floor, line("4,2", "e", 1, 60, 0.6)],
        ecar1=[floor, line("6,3", "e", 2, 50, 0.6)],
    )  # fmt: skip
    assert set(record["ecar"]) == {"floor", "4,2", "6,3"} and record["ecar"]["floor"]["FD-EffNetLite0"] == 20


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"dit": [line("2", "d", 1, 90, 0.5, num=10)]}, "num is 10, but 1000"),
        ({"dit": [line("2", "d", 1, 90, 0.5, reference="other")]}, "reference is other"),
        ({"dit": [line("2", "d", 1, 90, 0.5, judge="a"), line("3", "d", 1, 90, 0.5, judge="b")]}, "another judge"),
        ({"dit": [line("2", "d", 1, 90, 0.5, decoder="a"), line("3", "d", 1, 9, 0.5, decoder="b")]}, "another decoder"),
        ({"dit": [line("2", "d", 1, 90, 0.5), line("2", "d", 1, 91, 0.5)]}, "twice for the same weights"),
        ({"dit": [line("2", "d", 1, 90, 0.5)], "distilled0": [line("4,2", "x", 1, 50, 0.5)],
          "distilled1": [line("4,2", "y", 1, 51, 0.5)]}, "students are not averaged"),
    ],
)  # fmt: skip
def test_curves_that_cannot_be_compared_are_refused(
    files: dict[str, list[str]], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Curves of another N or other images were averaged without a word."""
    with pytest.raises(SystemExit):
        compared(tmp_path, monkeypatch, ecar=[line("4,2", "e", 1, 60, 0.6)], **files)
    assert word in capsys.readouterr().err and not (tmp_path / "c.json").exists()


def test_both_sides_get_the_same_training_flops(digits_folder: Path) -> None:
    """matched.py divides ECAR's steps by the costs of a step: what it starts must cost the same, by the formulas."""
    common = ["--data", str(digits_folder), "--tokenizer", "pixels:2", "--resolution", "16"]
    common += ["--device", "cpu"]
    ecar = matched.step_flops([*common, "--preset", "nano", "--batch-size", "96", "--stage-share", "1", "0.75"])
    dit = matched.step_flops([*common, "--preset", "dit-nano", "--batch-size", "128"])
    assert round(3800 * ecar / dit) * dit == pytest.approx(3800 * ecar, rel=1e-3)
    half = matched.step_flops([*common, "--preset", "dit-nano", "--batch-size", "64"])
    assert dit == 2 * half and ecar > matched.step_flops(
        [*common, "--preset", "nano", "--batch-size", "96", "--stage-share", "1", "0.5"]
    )


def test_a_sheet_of_systems_has_a_row_per_class() -> None:
    labels = torch.tensor([1, 0, 1, 0, 1])  # every image as bright as its number
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4) * 50
    panel = side_by_side.rows_of_classes(Samples(images, labels), range(2), 2, 1)
    assert [[panel.getpixel((4 * i, 4 * j))[0] for i in range(2)] for j in range(2)] == [[50, 150], [0, 100]]
    page = side_by_side.sheet([("a", panel), ("b", panel)])
    assert page.size == (2 * 8 + side_by_side.GAP, 8 + side_by_side.CAPTION)
    assert page.getpixel((8 + side_by_side.GAP, side_by_side.CAPTION))[0] == 50


def test_times_of_a_quiet_machine_replace_those_of_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ECAR was measured beside other work here: by its own times it beats nothing."""
    files = {"ecar": [line("4,2", "e", 1, 40, 0.9)], "dit": [line("3", "d", 9, 60, 0.6), line("4:2", "d", 9, 60, 0.6)]}
    slow = json.loads(files["ecar"][0]) | {"seconds_per_image": 99}
    record = compared(tmp_path, monkeypatch, **files | {"ecar": [json.dumps(slow)]})
    beaten = "dit_settings_beaten_at_no_more_seconds"
    assert record["conclusions"]["any"]["FD-EffNetLite0"][beaten] == []
    runs = {kind: str(tmp_path / kind / "final") for kind in files}
    for kind, preset in (("ecar", "16x2x1+1"), ("dit", "dit-16x2x1+1")):
        command = ["train", "--data", str(digits_folder), "--resolution", "8", "--device", "cpu", "--max-steps", "1"]
        command += ["--batch-size", "6", "--preset", preset]
        assert main([*command, "--out", str(tmp_path / kind)]) == 0
    out = tmp_path / "seconds.json"
    arguments = [x for k in files for x in (f"--{k}", str(tmp_path / f"{k}.jsonl"), f"--{k}-model", runs[k])]
    monkeypatch.setattr("sys.argv", ["seconds.py", *arguments, "--images", "3", "--repeats", "1", "--out", str(out)])
    seconds.main()
    times = json.loads(out.read_text())
    assert set(times["ecar"]) == {"4,2"} and set(times["dit"]) == {"3", "4:2"} and min(times["dit"].values()) > 0
    out.write_text(json.dumps({"ecar": {"4,2": 1.0}, "dit": {"3": 0.5, "4:2": 2.0}}))
    record = compared(tmp_path, monkeypatch, "--seconds", str(out), **files)
    assert record["conclusions"]["any"]["FD-EffNetLite0"][beaten] == ["4:2"]
    out.write_text(json.dumps({"ecar": {"4,2": 1.0}, "dit": {"3": 0.5}}))
    with pytest.raises(SystemExit):
        compared(tmp_path, monkeypatch, "--seconds", str(out), **files)
    assert "no time for 4:2" in capsys.readouterr().err


def test_candidates_are_chosen_within_their_class_and_by_their_score() -> None:
    """Every group is of one class and no sample is used twice; of two, the better comes as often as its score says."""
    labels = torch.arange(4000) % 2
    score = torch.where(torch.arange(4000) < 2000, 0.0, 1.0)
    rows = candidates.chosen_rows(score, labels, 2, 2000, 1.0, torch.Generator().manual_seed(0))
    assert len(set(rows.tolist())) == 2000 and (labels[rows] == 0).sum() == 1000
    expected = 0.25 + 0.5 * torch.tensor(1.0).sigmoid()  # both good, or one of them and it is chosen
    assert abs(float(score[rows].mean()) - float(expected)) < 0.03
    rows, drawn = candidates.accepted_rows(score, labels, 0.5, 4, 1000, 30.0, torch.Generator().manual_seed(0))
    assert len(set(rows.tolist())) == 1000 and (labels[rows] == 0).sum() == 500
    tries = 1 + 0.5 + 0.25 + 0.125  # each is good with 1/2, and a power of 30 lets none of the others through
    assert abs(drawn - tries) < 0.1 and abs(float(score[rows].mean()) - 15 / 16) < 0.02


def test_candidates_are_drawn_by_cost_and_lines_of_other_numbers_of_images_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"num": 8, "power": 2.0, "FD-EffNetLite0": 3.0, "KID x 1000": 1.0}
    for name, num in (("a", 8), ("b", 9)):
        lines = [{**line, "num": num, "candidates": k, "flops_per_image": 5 * k} for k in (2, 1)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert [each["candidates"] for each in candidates_plot.read([["ECAR", a]])["ECAR"]] == [1, 2]
    half = {**line, "candidates": 8, "acceptance": 0.5, "drawn": 2, "flops_per_image": 9}
    (tmp_path / "c.jsonl").write_text((tmp_path / "a.jsonl").read_text() + json.dumps(half) + "\n")
    curves = candidates_plot.read([["ECAR", str(tmp_path / "c.jsonl")]])
    assert [each["flops_per_image"] for each in curves["ECAR"]] == [5, 10]
    assert [each["flops_per_image"] for each in curves["ECAR, until one is accepted"]] == [5, 9]
    out = tmp_path / "c.png"
    monkeypatch.setattr("sys.argv", ["candidates_plot.py", "--system", "ECAR", a, "--out", str(out)])
    candidates_plot.main()
    assert out.stat().st_size > 1000
    monkeypatch.setattr("sys.argv", ["candidates_plot.py", "--system", "E", a, "--system", "D", b, "--out", str(out)])
    with pytest.raises(SystemExit):
        candidates_plot.main()
    assert "different num" in capsys.readouterr().err
