"""Hook of mkdocs: links of docs/ to files beside it (records, cards, benchmarks) work in the site too.

Such files are copied to ``files/`` in the site, and the links follow; links to folders become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def _place(path: str) -> str:
    """Where a file of the repository lies in the site; as text, so that mkdocs takes no card for a page."""
    return f"files/{path}.txt" if path.endswith(".md") else f"files/{path}"


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to."""
    for page in list(files.documentation_pages()):
        for _, _, path, _ in _OUTSIDE.findall(page.content_string):
            if (ROOT / path).is_file() and files.get_file_from_path(_place(path)) is None:
                files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to those files; what does not exist is left, for mkdocs to complain."""

    def link(found: re.Match[str]) -> str:
        mark, text, path, _ = found.groups()
        if (ROOT / path).is_dir():
            return text
        return f"{mark}[{text}]({_place(path)})" if (ROOT / path).is_file() else found[0]

    return _OUTSIDE.sub(link, markdown)
