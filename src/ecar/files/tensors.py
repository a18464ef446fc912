"""Files of tensors: safetensors, written beside and renamed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecar.files.access import check_readable, usual_mode

_METADATA, _ABOUT = "__metadata__", "ecar"
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
    size = int.from_bytes(data[:8], "little")  # of the header, in JSON
    try:
        header = json.loads(data[8 : 8 + size])
        del header[_METADATA][_ABOUT], header[_METADATA]
    except (ValueError, RecursionError, KeyError, TypeError):  # none, or a damaged file: whoever loads it says so
        return hashlib.sha256(data).hexdigest()[:16]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()  # as the library writes it
    text += b" " * (-len(text) % 8)
    return hashlib.sha256(len(text).to_bytes(8, "little") + text + data[8 + size :]).hexdigest()[:16]


def copy_tensors(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """Copy a safetensors file, with other metadata: the fingerprint stays."""
    write_tensors(target, load_file(source), metadata)


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
