"""The documentation holds together: links lead somewhere, pages stay short, named functions exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "results/**/*.md", "src/ecar/bundled/*/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LONGER = {
    "README.md": 110,
    "docs/reliability.md": 150,
    "docs/results.md": 150,
    "docs/log.md": 1000,
}  # every other page: 120 lines


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub and mkdocs make them for plain headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    """Records and pages moved, and links to them stayed behind."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    broken = []
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_record_is_linked_from_the_page_of_its_folder() -> None:
    """A record that no page names says nothing to a reader."""
    for folder in (path for path in (ROOT / "results").iterdir() if path.is_dir()):
        page = (folder / "README.md").read_text()
        assert [file.name for file in folder.iterdir() if f"({file.name})" not in page] == ["README.md"], folder.name


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") or page in LONGER])
def test_pages_are_short(page: str) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= LONGER.get(page, 120)


def test_what_the_reference_names_exists() -> None:
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert len(named) > 5
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_functions_of_the_equations_are_where_the_method_says() -> None:
    """Files moved, and the page of the method named places that were gone."""
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", (ROOT / "docs/method.md").read_text())
    assert len(named) > 10
    gone = [
        f"{path}: {name}"
        for path, names in named
        for name in re.findall(r"\w+", names)
        if not (ROOT / "src/ecar" / path).is_file()
        or not re.search(rf"^(?:def|class) {name}\b", (ROOT / "src/ecar" / path).read_text(), re.MULTILINE)
    ]
    assert gone == []


def test_the_tree_of_the_readme_is_that_of_the_package() -> None:
    """Folders came and went, and newcomers looked for them in vain."""
    tree = (ROOT / "README.md").read_text().partition("src/ecar/\n")[2].partition("```")[0]
    named = set(re.findall(r"^  ([\w.]+)", tree, re.MULTILINE))
    package = ROOT / "src" / "ecar"
    parts = {p.name for p in package.iterdir() if not p.name.startswith("__") and p.suffix in ("", ".py")}
    assert named == parts
