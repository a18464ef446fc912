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
PUBLIC = {"ecar.Pipeline": "ecar.sampling.pipeline", "ecar.__version__": "ecar"}
LAYERS = (
    "files", "config", "devices", "processes", "stages", "network", "tokenizers", "baselines", "pretrained", "sampling",
    "data", "evaluation", "training", "refine", "cost", "serving", "hub", "fitting", "cli",
)  # fmt: skip


def module_of(file: Path) -> str:
    """``ecar.sampling.loop`` of its file; a package is named without ``__init__``."""
    return ".".join(("ecar", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in it; names from ``ecar`` itself are of the pipeline."""
    modules: set[str] = set()
    known = {module_of(f) for f in FILES}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names if a.name.startswith("ecar.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ecar":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                modules.add(inner if inner in known else PUBLIC.get(inner, str(node.module)))
    return modules


def layer(module: str) -> str:
    return module.split(".")[1]


def test_every_part_of_the_package_is_a_layer() -> None:
    parts = {layer(module_of(f)) for f in FILES if f.name not in ("__main__.py",) and f.parent != SOURCE} | {
        f.stem for f in SOURCE.glob("*.py") if not f.name.startswith("__")
    }
    assert parts == set(LAYERS)


@pytest.mark.parametrize("file", [f for f in FILES if not f.name.startswith("__main__")], ids=module_of)
def test_imports_go_one_way(file: Path) -> None:
    if module_of(file) == "ecar":
        return
    own = LAYERS.index(layer(module_of(file)))
    upwards = {m for m in imports(file) if m != "ecar" and LAYERS.index(layer(m)) > own}
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_of(f): imports(f) - {module_of(f)} for f in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(graph.get(module, set()) - {"ecar"}):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        if module != "ecar":
            visit(module, ())


def test_the_engine_of_training_knows_no_stages() -> None:
    for file in (SOURCE / "training" / "engine").glob("*.py"):
        allowed = {"files", "devices", "config", "processes"}
        others = {m for m in imports(file) if not m.startswith("ecar.training.engine") and m != "ecar"}
        assert {layer(m) for m in others} <= allowed, file


def test_algorithm_code_draws_no_random_numbers_and_has_no_training_switch() -> None:
    for part in ("stages", "network"):
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
    for file in (
        SOURCE / "config.py", SOURCE / "data" / "reading.py", SOURCE / "training" / "engine" / "options.py",
        SOURCE / "training" / "inputs.py", SOURCE / "training" / "shape.py",
        SOURCE / "training" / "tokenizer_config.py", SOURCE / "fitting" / "options.py",
        *(SOURCE / "cli").glob("*.py"),
    ):  # fmt: skip
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and "as resolved" in (ast.get_docstring(node) or ""):
                continue  # the same options again
            if isinstance(node, ast.ClassDef) and node.decorator_list:
                for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(field, ast.AnnAssign):
                        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                        assert described, (file, ast.unparse(field))


def test_import_of_the_package_is_light() -> None:
    code = "import sys, ecar; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
