"""Latent tables: the latents of a data set, in memory or in the shards of a cache folder (``shards``)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import Side
from ecar.data.rows import choose_rows
from ecar.data.source import ImageReport, ImageSource, iterate_images
from ecar.devices import images_at_once
from ecar.files.images import to_signed
from ecar.tokenizers import Tokenizer

_BATCH = 250
_MEASURED = 10_000  # images, at most, of which statistics are taken


@dataclass(frozen=True, kw_only=True)
class LatentTable:
    """Unit-scale latents of N images, in memory or in shards that are mapped into it: what a batch reads is loaded, and
    the system may drop it again.

    Attributes:
        latents: (F, N, C, h, w) float16, or per shard (F, n, C, h, w); F = 2 when the second half are the mirrored
            images, else 1. Means where there is ``logvar``.
        logvar: per shard like ``latents``: logarithm of the variance; empty where the tokenizer is deterministic.
        shift: (C,) subtracted at loading; None: nothing, and nothing is divided.
        scale: (C,) divided by at loading.
        chosen: rows of the shards that are used; None: all.
        labels: (N,) int64.
        class_names: one name per class; empty for unlabelled data.
        image_side: (height, width) of the images.
        tokenizer: fingerprint of the tokenizer that made them.
        encoder: its fingerprint before its statistics were measured on the data; "" where they were known.
        skipped: bad images left out.
        content: fingerprint of the data: other images, labels or another order have another; "" where it is not known.
        about: what was found and what is left out (``ImageSource.about``), for records.
    """

    latents: Tensor | tuple[Tensor, ...]
    logvar: tuple[Tensor, ...] = ()
    shift: Tensor | None = None
    scale: Tensor | None = None
    chosen: Tensor | None = None
    labels: Tensor
    class_names: tuple[str, ...]
    image_side: Side
    tokenizer: str
    encoder: str = ""
    skipped: tuple[str, ...] = ()
    content: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shards(self) -> tuple[Tensor, ...]:
        """``latents`` per shard; in memory there is one."""
        return (self.latents,) if isinstance(self.latents, Tensor) else self.latents

    @property
    def mirrors(self) -> int:
        """2 where the images are there mirrored too, else 1."""
        return self.shards[0].shape[0]

    def batch(self, mirrored: Tensor, rows: Tensor, seed: int | None = None) -> Tensor:
        """Latents (B, C, h, w) float32 of ``rows`` (B,), as they are (``mirrored`` 0) or mirrored (1). Where the table
        holds distributions, a sample of each, drawn from ``seed``; their means without one."""
        z = self._gather(self.shards, mirrored, rows)
        if self.logvar and seed is not None:
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
            z = z + torch.exp(0.5 * self._gather(self.logvar, mirrored, rows)) * noise
        if self.shift is None or self.scale is None:
            return z
        return (z - self.shift.view(-1, 1, 1)) / self.scale.view(-1, 1, 1)

    def take(self, rows: Tensor) -> Self:
        """The images ``rows`` (M,) of the table alone."""
        chosen = rows if self.chosen is None else self.chosen[rows]
        return replace(self, chosen=chosen, labels=self.labels[rows])

    def part(self, *, flip: bool, images: int | None) -> Self:
        """``images`` of the table, at random (always the same ones), without the mirrored ones unless ``flip``."""
        table = self.take(torch.from_numpy(choose_rows(len(self), images)))
        latents, logvar = (tuple(x[: 2 if flip else 1] for x in shards) for shards in (self.shards, self.logvar))
        return replace(table, latents=latents, logvar=logvar)

    def _gather(self, shards: tuple[Tensor, ...], mirrored: Tensor, rows: Tensor) -> Tensor:
        rows = torch.as_tensor(rows) if self.chosen is None else self.chosen[torch.as_tensor(rows)]
        ends = torch.tensor([shard.shape[1] for shard in shards]).cumsum(0)
        home, out = torch.searchsorted(ends, rows, right=True), torch.empty(len(rows), *shards[0].shape[2:])
        for shard in home.unique().tolist():
            here = home == shard
            start = int(ends[shard - 1]) if shard else 0
            out[here] = shards[shard][mirrored[here], rows[here] - start].float()
        return out


@torch.no_grad()
def encode_source(
    source: ImageSource, tokenizer: Tokenizer, side: Side, *, flip: bool, device: str = "cpu"
) -> LatentTable:
    """Encode every image of ``source``. Statistics that were not measured yet (pixels, a diffusers
    autoencoder as published) are measured on the way, in place.

    Raises:
        ValueError: sides that do not divide, bad data, or coloured images for a grey tokenizer.
    """
    tokenizer.latent_side(*side)
    tokenizer.to(device)
    report, mirrors, size = ImageReport(), 2 if flip else 1, images_at_once(*side, most=_BATCH)
    latents = torch.empty(mirrors, len(source), tokenizer.channels, *tokenizer.latent_side(*side), dtype=torch.float16)
    raw: list[Tensor] = []  # (F, B, C, h, w), kept where the tokenizer's scale is known at the end only
    labels: list[Tensor] = []
    done = 0
    batches = iterate_images(source, *side, batch_size=size, report=report)
    for images, batch_labels in tqdm(batches, total=-(-len(source) // size), desc="encoding", disable=None):
        pixels = torch.from_numpy(to_signed(images)).permute(0, 3, 1, 2).to(device)
        tokenizer.check_images(pixels)
        both = torch.stack([tokenizer.encode_raw(p).float() for p in (pixels, pixels.flip(-1))[:mirrors]])
        if tokenizer.measured:
            latents[:, done : done + len(images)] = tokenizer.normalize(both).half().cpu()
        else:
            raw.append(both.cpu())
        labels.append(torch.from_numpy(batch_labels))
        done += len(images)
    report.name_skipped()
    tokenizer.to("cpu")
    if raw:
        tokenizer.measure(both[0] for both in raw[:: max(1, len(raw) // max(1, _MEASURED // size))])
        done = 0
        while raw:  # freed one by one
            both = raw.pop(0)
            latents[:, done : done + both.shape[1]] = tokenizer.normalize(both).half()
            done += both.shape[1]
    return LatentTable(
        latents=latents[:, :done],
        labels=torch.cat(labels),
        class_names=source.class_names,
        image_side=side,
        tokenizer=tokenizer.fingerprint(),
        skipped=tuple(report.skipped),
        content=report.content,
        about=source.about(),
    )
