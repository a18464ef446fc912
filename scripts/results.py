"""What the measuring scripts share: how a result is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_result(record: dict[str, Any], out: Path | None) -> None:
    """The record into ``out`` (folders are made), and as the last line on the screen."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
