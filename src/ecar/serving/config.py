"""Limits of the server. Imports nothing heavy: the command line reads it before torch is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from ecar.files.options import flag

if TYPE_CHECKING:
    from ecar.config import SamplingConfig

MAX_IMAGES = 10  # per request, as in the OpenAI API
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


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
    url_ttl: float = 0.0
    """Images are kept for this many seconds, under a url that asks for no key; 0: none are kept."""
    url_bytes: int = 2**28
    """Bytes of all images that are kept; the oldest go first."""
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
        if not 0 <= self.url_ttl <= 86400 or self.url_bytes < 1:
            raise ValueError(
                f"--url-ttl must be in 0..86400 seconds and --url-bytes positive, got {self.url_ttl}, {self.url_bytes}"
            )
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
        parts = _address(value)
        if value != "*" and (parts is None or "*" in value or parts.path or parts.query or parts.fragment):
            raise ValueError(f"{flag} {value}: give scheme://host[:port] without a path, as browsers send it, or *")
        origins.append(value if parts is None else _origin(parts))
    return tuple(origins)


def check_public_url(value: str) -> str:
    """A base of URLs, without a slash at its end.

    Raises:
        ValueError: no http or https address.
    """
    parts = _address(value.strip())
    if parts is None or parts.scheme not in _DEFAULT_PORTS or parts.query or parts.fragment:
        raise ValueError(f"--public-url {value}: give the address clients use, such as https://images.example.com")
    return _origin(parts) + parts.path.rstrip("/")


def _address(text: str) -> SplitResult | None:
    """Of scheme://host[:port][/...]; None where it is none. A user name is none of an address that is shown."""
    try:
        parts = urlsplit(text)
        port = parts.port  # raises where it is no number
    except ValueError:
        return None
    fits = parts.scheme and parts.hostname and port != 0 and "@" not in parts.netloc and not parts.netloc.endswith(":")
    plain = text.isascii() and text.isprintable() and not set(text) & set(' "<>\\^`{|}')
    return parts if fits and plain else None


def _origin(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.lower().removesuffix(_DEFAULT_PORTS.get(parts.scheme, ' '))}"
