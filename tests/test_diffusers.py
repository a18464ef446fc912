"""A published folder in the hands of diffusers: a fresh process that knows nothing of ecar but that it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from conftest import random_model, tiny_config
from ecar import Pipeline
from ecar.cli.main import main
from ecar.config import CardOptions
from ecar.hub import write_folder
from ecar.pretrained.folders import weights_fingerprint
from ecar.tokenizers import PixelTokenizer
from test_hub_server import Hub

pytest.importorskip("diffusers")

DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
images = pipe(class_labels=["frog", 8], seeds=[0, 7], num_inference_steps=[4, 3]).images
images += pipe("frog", generator=torch.Generator().manual_seed(5)).images
for number, image in enumerate(images):
    image.save(f"{out}/{number}.png")
half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
assert (pipe.dtype, half.dtype, half.device.type) == (torch.float32, torch.bfloat16, "cpu")
assert half.to(torch.float32)("frog").images[0].size == (32, 32)
for wrong in ({"class_labels": "frgo"}, {"seeds": [0], "generator": torch.Generator()}):
    try:
        pipe(**wrong)
    except ValueError as error:
        print(error)
"""


def run(code: str, tmp_path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    around = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=around, capture_output=True, text=True, timeout=300, cwd=tmp_path)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """ "cifar10", as push would upload it."""
    assert main(["push", "cifar10", "someone/cifar10", "--dry-run", "--out", str(tmp_path / "published")]) == 0
    return tmp_path / "published"


def test_a_published_folder_draws_the_same_pixels_in_diffusers(published: Path, tmp_path: Path) -> None:
    done = run(DRAW, tmp_path, published, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("unknown class") and "not both" in done.stdout
    pipe = Pipeline.from_pretrained("cifar10", device="cpu")
    wanted = pipe(["frog", "ship"], seeds=[0, 7], steps=(4, 3)).images + pipe(["frog"], seeds=[5]).images
    for number, image in enumerate(wanted):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{number}.png")), np.asarray(image))
    card = (published / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("someone/cifar10", trust_remote_code=True)' in card


def test_without_ecar_diffusers_users_are_told_what_is_missing(published: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["ecar"] = None
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained({str(published)!r}, trust_remote_code=True)
"""
    done = run(code, tmp_path)
    assert done.returncode == 1 and "computed by the Python package ecar" in done.stderr.splitlines()[-1]
    assert json.loads((published / "model_index.json").read_text())["_class_name"] == ["pipeline", "EcarPipeline"]


REVISIONS = """
import sys
from diffusers import DiffusionPipeline
from ecar.pretrained.folders import weights_fingerprint
for revision in (None, 40 * "b"):
    pipe = DiffusionPipeline.from_pretrained("someone/tiny", revision=revision, trust_remote_code=True)
    print(weights_fingerprint(pipe.ecar.name))
"""


def test_diffusers_gets_the_model_of_the_commit_that_it_was_asked_for(tmp_path: Path) -> None:
    """It fetches files by its own rules, and the tokenizer is not among them."""
    with Hub() as hub:
        hub.hostile = ()
        for seed, commit in enumerate("ab"):
            pipe = Pipeline(random_model(tiny_config(), seed=seed), PixelTokenizer(factor=1))
            write_folder(pipe, tmp_path / commit, "someone/tiny", CardOptions())
            hub.revisions[40 * commit] = tmp_path / commit
        hub.main = 40 * "a"
        Thread(target=hub.serve_forever, daemon=True).start()
        done = run(
            REVISIONS, tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
            HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", DISABLE_TELEMETRY="1",
        )  # fmt: skip
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [weights_fingerprint(tmp_path / commit) for commit in "ab"]
