"""Held-out data (``--val-data``): what they are, and whether they are of the same kind as the training data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ecar.config import match_names
from ecar.data.latents import LatentTable, encode_source
from ecar.data.rows import choose_rows
from ecar.data.shards import is_cache, load_latents
from ecar.data.source import ImageSource, load_source
from ecar.tokenizers import Tokenizer
from ecar.training.config import Training

IMAGES = 256  # at most


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What ``--val-data`` names: latents, images that are not encoded yet, or a share of the training data."""

    name: str
    data: LatentTable | ImageSource | float

    @classmethod
    def open(cls, config: Training) -> HeldOut | None:
        """None without ``--val-data``. Nothing is encoded yet.

        Raises:
            ValueError: no such data, or a share that is none.
        """
        name = config.data.val_data
        if name is None:
            return None
        if is_cache(name):
            return cls(name=name, data=load_latents(name)[0].part(flip=False, images=IMAGES))
        if (share := _share(name)) is None:
            return cls(name=name, data=load_source(name, config.data.reading(), max_images=IMAGES))
        if not 0 < share < 1:
            raise ValueError(f"--val-data {name}: a share of the data must be between 0 and 1")
        return cls(name=name, data=share)

    def check(self, config: Training, names: tuple[str, ...], tokenizer: str) -> None:
        """Cheap, before images are encoded.

        Args:
            names: classes of the training data.
            tokenizer: fingerprint of that which made their latents, or will.

        Raises:
            ValueError: held-out data of classes that are not trained, of another side or another tokenizer.
        """
        if isinstance(self.data, float):
            return
        given, held = config.data.data, f"--val-data {self.name}"
        theirs = self.data.class_names
        if len(match_names(theirs, names)) < len(theirs) or bool(theirs) != bool(names):
            raise ValueError(f"{held} has the classes {theirs[:5]}, and --data {given} has {names[:5]}")
        if isinstance(self.data, ImageSource):
            return
        if self.data.image_side != config.model.image_side:
            raise ValueError(f"{held} holds images of {self.data.image_side}, not {config.model.image_side}")
        if self.data.tokenizer != tokenizer:
            own = f"{given}/tokenizer" if is_cache(given) else "the one of the training data, or give images"
            raise ValueError(f"{held} holds latents of another tokenizer; encode it with --tokenizer {own}")

    def tables(self, config: Training, table: LatentTable, tokenizer: Tokenizer) -> tuple[LatentTable, LatentTable]:
        """What is trained on, of ``table``, and what is held out, at most ``IMAGES``.

        Raises:
            ValueError: a share that leaves no images to one of the two.
        """
        if isinstance(self.data, LatentTable):
            return table, _with_ids_of(table, self.data)
        if isinstance(self.data, ImageSource):
            side, device = config.model.image_side, config.run.device
            return table, _with_ids_of(table, encode_source(self.data, tokenizer, side, flip=False, device=device))
        count = round(self.data * len(table))
        if not 0 < count < len(table):
            raise ValueError(f"--val-data {self.name}: {count} of {len(table)} images would be held out")
        held, rest = torch.from_numpy(choose_rows(len(table), count)), torch.ones(len(table), dtype=torch.bool)
        rest[held] = False
        return table.take(rest.nonzero().flatten()), table.take(held).part(flip=False, images=IMAGES)


def _with_ids_of(table: LatentTable, held: LatentTable) -> LatentTable:
    """``held`` with the class ids of ``table``, which may have more classes."""
    if not held.class_names:
        return held
    places = match_names(held.class_names, table.class_names)
    ids = torch.tensor([places[label] for label in range(len(held.class_names))])
    return replace(held, labels=ids[held.labels], class_names=table.class_names)


def _share(name: str) -> float | None:
    """``name`` as a number, where no file has it; None if it is none."""
    try:
        return None if Path(name).expanduser().exists() else float(name)
    except ValueError:
        return None
