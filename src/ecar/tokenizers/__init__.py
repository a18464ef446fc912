"""Tokenizers: images <-> unit-scale latents, one protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ecar.tokenizers.base import Tokenizer
from ecar.tokenizers.conv import ConvTokenizer
from ecar.tokenizers.pixels import PixelTokenizer

__all__ = ["ConvTokenizer", "PixelTokenizer", "Tokenizer", "load_tokenizer"]


def load_tokenizer(name: str | Path) -> Tokenizer:
    """A tokenizer by name: ``pixels``, ``pixels:FACTOR``, a folder written by ``save``, a diffusers autoencoder's
    folder, or a Hub id of one.

    Raises:
        ValueError: nothing there, an unknown kind, damaged or missing weights.
    """
    text = str(name)
    if text == "pixels" or text.startswith("pixels:"):
        factor = text.partition(":")[2] or "4"
        if not factor.isdigit():
            raise ValueError(f"tokenizer {text!r}: the factor must be a whole number, as in pixels:4")
        return PixelTokenizer(factor=int(factor))
    folder = Path(text).expanduser()
    config = folder / "config.json"
    if config.exists():
        try:
            record = json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"{config}: not JSON ({error})") from None
        if "kind" in record:
            return _load_own(folder, record)
    elif folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"tokenizer {text!r}: no config.json there; give pixels, a tokenizer folder or a Hub id")
    from ecar.tokenizers.diffusers import DiffusersTokenizer

    return DiffusersTokenizer.load(text)


def _load_own(folder: Path, record: dict[str, Any]) -> Tokenizer:
    from ecar.weights import load_weights

    record = dict(record)
    kind, expected = record.pop("kind"), record.pop("fingerprint", None)
    tokenizer: Tokenizer
    own: nn.Module
    if kind == "diffusers":
        from ecar.tokenizers.diffusers import DiffusersTokenizer

        wrapped = DiffusersTokenizer.load(str(folder / "autoencoder"), class_name=record["class_name"])
        tokenizer, own = wrapped, wrapped.statistics()
    elif kind == "conv":
        tokenizer = own = ConvTokenizer(**{**record, "widths": tuple(record["widths"])})
    elif kind == "pixels":
        tokenizer = own = PixelTokenizer(**record)
    else:
        raise ValueError(f"{folder / 'config.json'}: unknown tokenizer kind {kind!r}")
    load_weights(own, folder / "tokenizer.safetensors")
    tokenizer.measured = True
    if expected is not None and tokenizer.fingerprint() != expected:
        raise ValueError(f"{folder}: the weights are not those that config.json describes (fingerprint differs)")
    return tokenizer
