"""``ecar tokenizer``: train the convolutional autoencoder."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ecar.cli.options import parse
from ecar.training.config import TokenizerConfig

OPTIONS = TokenizerConfig


def run(arguments: Sequence[str]) -> None:
    """Parse, train, print what was written as JSON. Stopped by a signal, it exits as ``ecar train`` does."""
    config = parse(TokenizerConfig, arguments, "tokenizer")
    from ecar.processes.signals import exit_when_stopped
    from ecar.training.tokenizer import train_tokenizer

    with exit_when_stopped():
        tokenizer = train_tokenizer(config)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    print(json.dumps({"tokenizer": config.run.out, "parameters": parameters, "fingerprint": tokenizer.fingerprint()}))
