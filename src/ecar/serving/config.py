"""Limits of the server, its API keys, and the name of its model. Imports nothing heavy: the command line reads it
before torch is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecar.files.options import flag

if TYPE_CHECKING:
    from ecar.config import SamplingConfig

MAX_IMAGES = 10  # per request, as in the OpenAI API
KEYS_VARIABLE = "ECAR_API_KEYS"
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server accepts and how it batches."""

    max_batch: int = 32
    """Images computed at once."""
    max_queue: int = 64
    """Images that may wait; a request that does not fit is answered 429."""
    gather_ms: float = 16.0
    """An idle engine waits up to this long for company before it starts a batch; a quarter of it where nobody comes."""
    deadline: float = 120.0
    """Seconds from arrival until a request is given up (504)."""
    max_steps: int = 128
    """Solver steps of one image, all stages together: the bound of what one image may cost."""
    max_candidates: int = 8
    """Candidates of one image, of which the critic of the model chooses; 1 where it has none."""
    max_body: int = 2**20
    """Bytes of a request body."""
    max_upload: int = 2**24
    """Bytes of the body of an edit, which carries pictures."""
    body_seconds: float = 20.0
    """Seconds in which a request body has to arrive."""
    head_seconds: float = 10.0
    """Seconds in which the head of a request has to arrive."""
    send_seconds: float = 20.0
    """A client that takes less than 16 KiB of what waits for it in this time is cut off."""
    max_connections: int = 512
    """Open connections; more are answered 503, and from twice as many on closed at once."""
    drain_seconds: float = 30.0
    """After SIGTERM: seconds for finishing what was accepted."""

    def check_model(self, settings: SamplingConfig) -> None:
        """ValueError, naming the flag, where the model's own settings would be refused in every request."""
        if sum(settings.steps) > self.max_steps:
            raise ValueError(f"--max-steps {self.max_steps}: the model itself takes {sum(settings.steps)} steps")

    def check(self) -> None:
        """ValueError, naming the flag, unless the values are usable. (The command line's parser would wrap one raised
        while it builds the object.)"""
        for name in ("max_batch", "max_steps", "max_candidates", "max_body", "max_upload", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.max_queue < MAX_IMAGES:
            raise ValueError(f"--max-queue must hold one request ({MAX_IMAGES} images), got {self.max_queue}")
        for name in ("deadline", "body_seconds", "head_seconds", "send_seconds", "drain_seconds"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{flag(name)} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.gather_ms <= 1000:
            raise ValueError(f"--gather-ms must be in 0..1000, got {self.gather_ms}")


def check_origins(values: Iterable[str], flag: str) -> tuple[str, ...]:
    """Origins as browsers send them: small letters, no default port.

    Args:
        values: scheme://host[:port] each, or "*" for every page.
        flag: what errors call it.

    Raises:
        ValueError: one could never match.
    """
    origins = []
    for value in map(str.strip, values):
        origin = value.lower()
        found = _ORIGIN.fullmatch(origin)
        if value != "*" and (found is None or int(found[1] or 0) > 65535):
            raise ValueError(f"{flag} {value}: give scheme://host[:port] without a path, as browsers send it, or *")
        origins.append(origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], " ")))
    return tuple(origins)


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
