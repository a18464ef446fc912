"""Tokenizers: images <-> unit-scale latents, one protocol. Every file of this folder may define one."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import torch

from ecar.files.access import check_readable
from ecar.files.records import read_json
from ecar.tokenizers.base import Tokenizer
from ecar.tokenizers.conv import ConvTokenizer
from ecar.tokenizers.pixels import PixelTokenizer

__all__ = [
    "ConvTokenizer",
    "PixelTokenizer",
    "Tokenizer",
    "bundled_tokenizers",
    "load_decoder",
    "load_tokenizer",
]


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

BUNDLED = Path(__file__).parent.parent / "bundled" / "tokenizers"


def bundled_tokenizers() -> list[str]:
    """Names of the tokenizers inside the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def load_tokenizer(name: str | Path) -> Tokenizer:
    """A tokenizer by name: ``pixels``, ``pixels:FACTOR``, a bundled name (of a model: that model's), a folder written
    by ``save``, a diffusers autoencoder's folder, or its Hub id.

    Raises:
        ValueError: nothing there, an unknown kind, damaged or missing weights.
    """
    text = str(name)
    if text == "pixels" or text.startswith("pixels:"):
        factor = text.partition(":")[2] or "4"
        if not factor.isdecimal():
            raise ValueError(f"tokenizer {text!r}: the factor must be a whole number, as in pixels:4")
        return PixelTokenizer(factor=int(factor))
    folder = BUNDLED / text if text in bundled_tokenizers() else Path(text).expanduser()
    if not folder.exists() and "/" not in text and (BUNDLED.parent / text / "tokenizer").exists():
        folder = BUNDLED.parent / text / "tokenizer"
    config = folder / "config.json"
    check_readable(config)
    if config.exists():
        record = read_json(config, "restore the configuration of a tokenizer")
        if "kind" in record:
            try:
                return _load_own(folder, record)
            except (TypeError, KeyError) as error:  # fields that are missing, unknown or of other types
                raise ValueError(f"{config}: not the configuration of a tokenizer ({error})") from None
        if "model" in record:
            raise ValueError(f"tokenizer {text!r}: a model; its tokenizer is {folder / 'tokenizer'}")
    elif folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"tokenizer {text!r}: no config.json there; give pixels, a tokenizer folder or a Hub id")
    from ecar.tokenizers.diffusers import DiffusersTokenizer

    return DiffusersTokenizer.load(text)


def load_decoder(source: str | Path, tokenizer: Tokenizer) -> Tokenizer:
    """Another decoder for the latents of ``tokenizer``: of a convolutional autoencoder one that was trained further
    with its encoder frozen, of an AutoencoderKL an AutoencoderTiny.

    Args:
        source: folder of a tokenizer, or a folder or Hub id of an AutoencoderTiny.
        tokenizer: of the model.

    Raises:
        ValueError: nothing there, or of other latents.
    """
    if not isinstance(tokenizer, ConvTokenizer):
        from ecar.tokenizers.diffusers import tiny_decoder

        return tiny_decoder(source, tokenizer)
    other = load_tokenizer(source)
    if not isinstance(other, ConvTokenizer) or not same_latents(tokenizer, other):
        raise ValueError(
            f"decoder {str(source)!r}: reads other latents than the model's; "
            "train one with: ecar tokenizer --init-from MODEL/tokenizer --freeze-encoder"
        )
    return other


def same_latents(tokenizer: ConvTokenizer, other: ConvTokenizer) -> bool:
    """Whether both have the same encoder and statistics, but for rounding to float16."""
    ours, theirs = (
        {name: tensor for name, tensor in one.state_dict().items() if not name.startswith("decoder.")}
        for one in (tokenizer, other)
    )
    return ours.keys() == theirs.keys() and all(
        t.shape == theirs[n].shape and torch.allclose(t.to(theirs[n]), theirs[n], rtol=1e-3, atol=1e-6)
        for n, t in ours.items()
    )


def _load_own(folder: Path, record: dict[str, Any]) -> Tokenizer:
    kind, expected = record.pop("kind"), record.pop("fingerprint", None)
    if kind not in Tokenizer.kinds:
        raise ValueError(f"{folder / 'config.json'}: unknown tokenizer kind {kind!r}")
    tokenizer = Tokenizer.kinds[kind].restore(folder, record)
    tokenizer.measured = True
    if expected is not None and tokenizer.fingerprint() != expected:
        raise ValueError(f"{folder}: the weights are not those that config.json describes (fingerprint differs)")
    return tokenizer
