"""API keys of a server, and the name of its model in the API."""

from __future__ import annotations

import os
from pathlib import Path

KEYS_VARIABLE = "ECAR_API_KEYS"


def served_name(model: str) -> str:
    """A bundled name or Hub id as it is; of a folder, its own name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def read_keys(file: str | None) -> list[str]:
    """API keys of the file and the environment.

    Raises:
        ValueError: the file cannot be read or holds no key.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--keys-file {file}: cannot be read ({type(error).__name__})") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"--keys-file {file}: no key in it")
        keys += found
    return keys
