"""The shape of the package: imports go one way, files stay small, algorithm code draws no random numbers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "ecar"
FILES = sorted(SOURCE.rglob("*.py"))
# What each part may import; verbs (training, cli, ...) stand on top.
ALLOWED = {
    "stages": {"config", "stages"},
    "tokenizers": {"remote", "tensors", "tokenizers", "weights"},
    "transformer": {"config", "stages", "transformer"},
    "flow": {"config", "stages", "transformer", "flow"},
    "model.py": {"config", "stages", "transformer", "flow", "baselines"},
    "baselines": {"config", "stages", "transformer", "model"},
    "remote.py": set(),
    "tensors.py": set(),
    "weights.py": {"config", "model", "remote", "tensors", "tokenizers"},
    "sampling": {
        "config",
        "devices",
        "stages",
        "transformer",
        "flow",
        "model",
        "tokenizers",
        "weights",
        "adapters",
        "sampling",
        "selection",
        "hub",
    },
    "selection": {"features", "tensors", "selection"},
    "extrapolate.py": {"config", "data", "weights"},
    "transfer.py": {"config", "model", "stages"},
    "adapters.py": {"config", "model", "tensors", "transfer"},
    "data": {"config", "remote", "tokenizers", "data"},
    "benchmark": {
        "baselines",
        "config",
        "presets",
        "stages",
        "transformer",
        "flow",
        "model",
        "sampling",
        "training",
        "benchmark",
    },
    "serving": {"config", "stages", "sampling", "serving"},
    "evaluation": {"config", "data", "devices", "features", "sampling", "tensors", "evaluation"},
}


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {m.split(".")[1] for m in modules if m.startswith("ecar.")}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part: str) -> None:
    files = [SOURCE / part] if part.endswith(".py") else sorted((SOURCE / part).rglob("*.py"))
    assert files
    for file in files:
        assert imports(file) <= ALLOWED[part], file


def test_algorithm_code_draws_no_random_numbers_and_has_no_training_switch() -> None:
    for part in ("stages", "transformer", "flow"):
        for file in (SOURCE / part).rglob("*.py"):
            assert not re.search(r"torch\.rand|self\.training|\.cuda\(", file.read_text()), file


def test_files_and_functions_fit_in_one_head() -> None:
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, (file, node.name)


def test_every_option_has_a_description() -> None:
    """Command-line help is made from them."""
    for file in (SOURCE / "config.py", SOURCE / "training" / "config.py", *(SOURCE / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.decorator_list:
                for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(field, ast.AnnAssign):
                        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                        assert described, (file, ast.unparse(field))


def test_import_of_the_package_is_light() -> None:
    code = "import sys, ecar; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
