"""Files of tensors: safetensors, written beside and renamed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecar.files.access import check_readable, usual_mode

_METADATA, _ABOUT = "__metadata__", "ecar"
UNKNOWN = "not stated"  # a licence
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = (
    'convert its tensors, where you trust it, with: python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('{}', weights_only=True), '{}')\""
)


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
    usual_mode(temporary)
    temporary.replace(path)


def about(**facts: str) -> dict[str, str]:
    """What a file of weights says of itself, for ``write_tensors``: for people who find it alone. Nothing reads it, and
    ``tensors_fingerprint`` leaves it out. In one entry: the order of several differs from run to run."""
    return {_ABOUT: json.dumps(facts, ensure_ascii=False)}


def tensors_fingerprint(path: Path) -> str:
    """SHA-256 (16 hex digits) of a safetensors file as it would be without what it says of itself."""
    data = path.read_bytes()
    header, body = _parts(data)
    if isinstance(header.get(_METADATA), dict) and _ABOUT in header[_METADATA]:
        del header[_METADATA]
        data = _joined(header, body)
    return hashlib.sha256(data).hexdigest()[:16]


def copy_tensors(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """Copy a safetensors file, with other metadata: the fingerprint stays.

    Raises:
        ValueError: not a safetensors file.
    """
    header, body = _parts(source.read_bytes())
    if not header:
        raise ValueError(f"{source}: not a readable safetensors file")
    header.pop(_METADATA, None)
    target.write_bytes(_joined({_METADATA: metadata, **header}, body))


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file: 8 bytes with the header's length, the header in JSON, the tensors; an
    empty header where there is none."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        header = None
    return (header, data[8 + size :]) if isinstance(header, dict) else ({}, b"")


def _joined(header: dict[str, Any], body: bytes) -> bytes:
    """The file of a header, byte for byte as the safetensors library writes it, and tensors."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill ``module`` from a safetensors file, strictly: every key, every shape.

    Raises:
        ValueError: file missing (a pickle beside it is named, never read), not to be read by this user, damaged, or of
            another module.
    """
    check_readable(path)
    if not path.exists():
        others = sorted(path.parent.glob("*"), key=lambda p: (p.stem != path.stem, p.name))
        pickles = [p.name for p in others if p.suffix in PICKLES]
        convert = CONVERT.format(path.with_name(pickles[0]), path) if pickles else ""
        hint = f" ({pickles[0]} is a pickle and is never loaded: {convert})" if pickles else ""
        raise ValueError(f"{path}: missing weights{hint}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or extra:
        raise ValueError(f"{path}: weights of another model; missing {_some(missing)}, unexpected {_some(extra)}")
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{path}: weights of another shape: {key} is {tuple(tensor.shape)}, "
                f"the configuration asks for {tuple(own[key].shape)}"
            )
    module.load_state_dict({key: tensor.to(own[key].dtype) for key, tensor in state.items()})


def _some(keys: list[str]) -> str:
    return f"{len(keys)}" + (f" (such as {keys[0]})" if keys else "")
