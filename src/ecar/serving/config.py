"""Limits of the server. Imports nothing heavy: the command line reads it before torch is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ecar.config import SamplingConfig

MAX_IMAGES = 10  # per request, as in the OpenAI API


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
    body_seconds: float = 20.0
    """Seconds in which a request body has to arrive."""
    head_seconds: float = 10.0
    """Seconds in which the head of a request has to arrive."""
    send_seconds: float = 20.0
    """A client that takes less than 16 KiB of what waits for it in this time is cut off."""
    max_connections: int = 512
    """Open connections; more are answered 503, and from twice as many on closed at once."""
    url_ttl: float = 0.0
    """Answers carry a url too, which works for this many seconds and asks for no key; 0: no images are kept."""
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
        for name in ("max_batch", "max_steps", "max_candidates", "max_body", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.max_queue < MAX_IMAGES:
            raise ValueError(f"--max-queue must hold one request ({MAX_IMAGES} images), got {self.max_queue}")
        for name in ("deadline", "body_seconds", "head_seconds", "send_seconds", "drain_seconds"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.url_ttl <= 86400 or self.url_bytes < 1:
            raise ValueError(
                f"--url-ttl must be in 0..86400 seconds and --url-bytes positive, got {self.url_ttl}, {self.url_bytes}"
            )
        if not 0 <= self.gather_ms <= 1000:
            raise ValueError(f"--gather-ms must be in 0..1000, got {self.gather_ms}")
