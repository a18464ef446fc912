"""``ecar fit`` in two real processes: one plan, one model, one report; and after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import several
from PIL import Image

from ecar.sampling.pipeline import Pipeline


def words_of(folder: Path, out: str) -> list[str]:
    """A tiny fit of 48 pictures of two classes, with every part but the tokenizer."""
    random = np.random.default_rng(0)
    for number in range(48 if not (folder / "photos").exists() else 0):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((16, 16), Image.Resampling.BICUBIC).save(path)
    flags = {
        "resolution": 16, "tokenizer": "pixels:2", "preset": "16x2x1+1", "start": "none", "batch-size": 8,
        "max-steps": 6, "scales": 1, "samples": 8, "critic-images": 0, "compile": 0, "minutes": 1, "device": "cpu",
    }  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["fit", str(folder / "photos"), "--out", str(folder / out), *given]


@pytest.mark.slow
def test_two_processes_fit_one_model_also_after_a_kill(tmp_path: Path) -> None:
    two, killed = words_of(tmp_path, "two"), words_of(tmp_path, "killed")
    codes, said = several.start(
        [
            {"words": two, "world": 2},
            {"words": two},  # nothing is left to do, for one either
            {"words": killed, "kill": 0},  # in its second shard
            {"words": killed, "world": 2},
        ],
        tmp_path,
    )
    assert (codes[0], codes[1], codes[3]) == ([0, 0], [0], [0, 0]), said
    assert codes[2] == [-9]
    for name in ("two", "killed"):
        found = json.loads((tmp_path / name / "work" / "done.json").read_text())
        assert list(found) == ["encode", "train", "model", "evaluate"]
        assert found["evaluate"]["evaluation"]["metrics"]["num"] == 8
        assert (tmp_path / name / "report.html").exists()
        assert Pipeline.from_pretrained(tmp_path / name, device="cpu").class_names == ("a", "b")
    assert said.count("plan for 40 pictures of 2 classes") == 4  # by the first process alone
