"""Images that are kept for a while, for clients that want a URL instead of bytes."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict


class FileStore:
    """Bytes in memory under names that cannot be guessed (192 random bits): who knows one may read it, without a key.

    Args:
        seconds: how long each is kept.
        max_bytes: of all together; the oldest go first.
    """

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self.seconds, self.max_bytes, self.size = seconds, max_bytes, 0
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # name -> (end of its time, bytes)
        self._lock = threading.Lock()

    def put(self, data: bytes, extension: str) -> str:
        """Keep the bytes; returns their name."""
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        with self._lock:
            self._files[name] = (time.monotonic() + self.seconds, data)
            self.size += len(data)
            self._forget()
        return name

    def get(self, name: str) -> bytes | None:
        """The bytes; None where there are none of that name, or their time is over."""
        with self._lock:
            self._forget()
            return self._files[name][1] if name in self._files else None

    def _forget(self) -> None:
        now = time.monotonic()
        while self._files:
            name, (end, data) = next(iter(self._files.items()))
            if end > now and self.size <= self.max_bytes:
                return
            del self._files[name]
            self.size -= len(data)
