"""Files of tensors: safetensors, written beside and renamed."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``path``, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)
    except SafetensorError as error:  # wraps errors of the disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from error
    temporary.replace(path)
