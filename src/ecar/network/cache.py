"""The key-value cache of the trunk: an object that the caller makes and passes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class StageCache:
    """Keys and values of the stages done so far, one contiguous buffer per layer, allocated once.

    Args:
        layers: blocks of the trunk.
        batch: rows.
        heads, head_dim: attention sizes.
        tokens: positions of all stages that will be appended.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, batch, heads, tokens, head_dim)
        self._keys, self._values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def memory(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys and values, (B, heads, length + tokens, head_dim); the last ones are to be filled."""
        end = self.length + tokens
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Close a stage: the next ``memory`` has its free places behind these tokens."""
        self.length += tokens

    def first_rows(self, rows: int) -> None:
        """Keep the first ``rows`` of the batch (guidance ends: the unconditional half goes)."""
        self._keys, self._values = self._keys[:, :rows], self._values[:, :rows]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self._keys.shape[1]

    def select(self, rows: Tensor | slice) -> Self:
        """A cache of some rows: a copy for indices, a view for a slice."""
        return self._with(self._keys[:, rows], self._values[:, rows])

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """Caches of the same stages as one, rows in order."""
        assert len({cache.length for cache in caches}) == 1, "the caches hold different stages"
        return caches[0]._with(torch.cat([c._keys for c in caches], 1), torch.cat([c._values for c in caches], 1))

    def _with(self, keys: Tensor, values: Tensor) -> Self:
        other = copy.copy(self)
        other._keys, other._values = keys, values
        return other
