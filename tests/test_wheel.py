"""The wheel by itself: what a user has who installs the package and never sees this repository."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
# Several commands in one process: most of the time of each is the import of torch.
_ALL = """
import json, sys
from ecar.cli.main import __file__ as file, main
assert file.startswith(sys.argv[1]), file
sys.exit(max(main(words) for words in json.loads(sys.argv[2])))
"""


@pytest.mark.slow
def test_the_wheel_alone_runs_the_demo(tmp_path: Path) -> None:
    """A bundled model, or a file that only the checkout has, would be missing."""
    pytest.importorskip("hatchling")
    site, work = tmp_path / "site", tmp_path / "work"
    (work / "demo").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", str(wheel), "--no-deps", "--no-compile", "--quiet", "--target", str(site))
    assert run(str(site / "bin" / "ecar"), "--version").startswith("ecar ")
    demo = re.findall(r"@\$\(BIN\)/ecar (.*) >/dev/null", (ROOT / "Makefile").read_text())
    assert len(demo) >= 3
    for many, few in (
        ("classes all", "classes Monarch,Adonis"),
        ("per-class 4", "per-class 1"),
        ("count 4", "count 1"),
    ):
        demo = [words.replace(many, few) for words in demo]
    push = "push cifar10 someone/cifar10 --dry-run --out upload"
    run(sys.executable, "-c", _ALL, str(site), json.dumps([shlex.split(words) for words in (*demo, push)]))
    for name in ("samples.png", "stages.gif", "edit.png"):
        with Image.open(work / "demo" / name) as picture:
            assert picture.width > 32 and picture.height >= 32
    assert (work / "upload" / "pipeline.py").is_file() and (work / "upload" / "model" / "ecar_model.py").is_file()
