"""Files of tensors: safetensors, written beside and renamed."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecar.files.access import check_readable, usual_mode

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
