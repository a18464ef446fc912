"""``ecar tokenizer``: train the convolutional autoencoder."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ecar.cli.options import parse
from ecar.training.config import TokenizerConfig


def run(arguments: Sequence[str]) -> None:
    """Parse, train, print what was written as JSON."""
    config = parse(TokenizerConfig, arguments, "tokenizer")
    from ecar.training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(config)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    print(json.dumps({"tokenizer": config.out, "parameters": parameters, "fingerprint": tokenizer.fingerprint()}))
