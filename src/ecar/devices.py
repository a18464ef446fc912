"""Devices by name, checked before work starts."""

from __future__ import annotations

import platform

import torch

_PIXELS_AT_ONCE = 2**20  # 16 images of 256x256: some hundred MB of maps in small networks, 4 GB in large autoencoders


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


def computes_bfloat16(device: str | torch.device) -> bool:
    """Whether products in bfloat16 are worth it there. CPUs without AVX512-BF16 or AMX and GPUs before Ampere only
    imitate them: on such a CPU sampling takes 6 times as long as in float32, an EfficientNet 12 (docs/cost.md)."""
    kind = torch.device(device).type
    if kind == "cpu":
        if not torch.backends.mkldnn.is_available():
            return False
        if platform.machine() in ("x86_64", "AMD64"):  # oneDNN supports bfloat16 where it imitates it with AVX-512
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def images_at_once(height: int, width: int, *, most: int = _PIXELS_AT_ONCE) -> int:
    """How many images of ``height`` x ``width`` pixels go through a network in one pass, where no option says it: maps
    grow with the pixels, so that a number of images alone bounds no memory. 1 .. ``most``."""
    return max(1, min(most, _PIXELS_AT_ONCE // (height * width)))


def mixed_precision(device: str | torch.device, *, wanted: bool = True) -> torch.autocast:
    """A context in which products are in bfloat16, where that is wanted and worth it."""
    enabled = wanted and computes_bfloat16(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
