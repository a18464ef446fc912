"""The folder of a run is not its model: every verb that takes a model says where that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import random_model, tiny_config
from ecar.cli.main import main
from ecar.pretrained.folders import save_model
from ecar.tokenizers import PixelTokenizer

VERBS = {
    "sample": ["sample", "RUN", "--out", "x.png"],
    "info": ["info", "RUN"],
    "evaluate": ["evaluate", "--model", "RUN", "--data", "DATA", "--allow-small", "--cache", "cache"],
    "train": ["train", "--data", "DATA", "--out", "new", "--init-from", "RUN", "--device", "cpu"],
    "critic": ["critic", "RUN", "--data", "DATA"],
    "neon": ["neon", "RUN", "--trained", "RUN", "--out", "new"],
    "push": ["push", "RUN", "owner/name", "--dry-run"],
    "serve": ["serve", "RUN", "--port", "0"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_folder_of_a_run_is_refused_with_the_place_of_its_model(
    verb: str, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "no config.json there" gave no hint."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text("{}\n")
    places = {"RUN": str(run), "DATA": str(digits_folder)}
    arguments = [places.get(word, word) for word in VERBS[verb]]
    assert main(arguments) == 2
    assert f"has not written its model yet; ecar train writes it to {run}/final" in capsys.readouterr().err
    save_model(run / "final", random_model(tiny_config()), PixelTokenizer(factor=1))
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert f"the folder of a training, not of a model; use {run}/final" in message and "\n" not in message
