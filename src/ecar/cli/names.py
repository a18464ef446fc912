"""Completes class names in a shell. Neither torch nor tyro is imported here: it runs at every press of Tab.

The scripts of ``ecar completion`` call it as ``ecar completion names CURRENT WORD...``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_BUNDLED = Path(__file__).parent.parent / "bundled"
_DEFAULT = "fashion"


def completions(current: str, words: Sequence[str]) -> list[str]:
    """What the word under the cursor can become: class names, after those that stand before its last comma.

    Args:
        current: the word as typed, with its quotes and backslashes.
        words: those before it, as typed: command, verb and so on.

    Returns:
        Whole words. In an open quote they are as they are, without the quote, which the shell keeps; otherwise blanks
        and other signs have a backslash.
    """
    quote = current[:1] if current[:1] in ("'", '"') else ""
    text = current[1:] if quote else re.sub(r"\\(.)", r"\1", current)
    before, comma, begun = text.rpartition(",")
    begun = begun.lstrip()
    names = class_names(model_of(list(map(_plain, words))))
    if not comma and words[1:2] == ["sample"]:
        names = [*names, "all", "none"]
    found = [f"{before}{comma}{name}" for name in names if name.lower().startswith(begun.lower())]
    return found if quote else [re.sub(r"([^\w@%+:,./-])", r"\\\1", word) for word in found]


def model_of(words: Sequence[str]) -> Path | None:
    """The ``config.json`` of the MODEL of a command line: the first word that is a model, those last that follow a
    flag; the default model where there is none."""
    own = sorted(pairwise(words[1:]), key=lambda pair: pair[0].startswith("-"))
    found = (_config(word) for _, word in own if not word.startswith("-"))
    return next((path for path in found if path is not None), _config(_DEFAULT))


def class_names(config: Path | None) -> list[str]:
    """Of a model's ``config.json``; none where it cannot be read."""
    try:
        names = json.loads(config.read_text())["model"]["class_names"] if config else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and name.isprintable()]


def _config(word: str) -> Path | None:
    """Of a bundled name, a folder or what the Hub's cache holds; no network."""
    for folder in (_BUNDLED / word, Path(word).expanduser()):
        if word and (folder / "config.json").is_file():
            return folder / "config.json"
    repo, _, revision = word.partition("@")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) and not Path(word).exists():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repo, "config.json", revision=revision or None)
        return Path(found) if isinstance(found, str) else None
    return None


def _plain(word: str) -> str:
    """A word as typed, without quotes and backslashes."""
    try:
        return " ".join(shlex.split(word))
    except ValueError:
        return word
