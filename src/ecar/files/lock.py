"""One run per folder: a lock that the operating system gives back when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold ``run/lock`` while the block runs.

    Raises:
        ValueError: another process holds it; pid and host are named.
    """
    path = run / "lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            raise ValueError(f"{run}: a run is active there ({holder}); wait for it, or choose another --out") from None
        except OSError as error:  # some network file systems have none
            print(f"WARNING: {run}: cannot be locked ({error.strerror}); start no second run there", file=sys.stderr)
        if left := _holder(path):
            print(f"{run}: taking over from a run that died ({left})", file=sys.stderr)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(path: Path) -> str:
    try:
        record = json.loads(path.read_text())
        return f"pid {record['pid']} on {record['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
