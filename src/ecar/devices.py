"""Devices by name, checked before work starts."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> str:
    """``auto`` -> cuda where there is one, else cpu; any other name is checked and returned.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try auto or cpu") from None
    if name.startswith("cuda:"):  # events, streams and graphs are made on the current device, not on that of the work
        torch.cuda.set_device(name)
    return name
