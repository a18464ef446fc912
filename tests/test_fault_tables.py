"""The documentation names the tests that show what it promises: they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_test_that_a_table_of_faults_names_exists() -> None:
    page = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"`(?:[./\w]*/)?(test_\w+\.py)::(test_\w+)(?:\.\.\.)?`", page)
    assert len(named) > 60
    gone = [f"{file}::{test}" for file, test in named if f"def {test}" not in TESTS.get(file, "")]
    assert gone == []
