"""What is known of a batch in one stage: the path of a picture, and where and from when the model draws instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Known:
    """The known path of stage k for B rows, x_k^{t*} = (1 - t) x_k^{0*} + t y_k^*.

    Attributes:
        start: x_k^{0*}, (B, C, h_k, w_k).
        end: y_k^*, the same size.
        mask: m_k, (B, 1, h_k, w_k), float: 1 where the model draws, 0 where the path holds.
        begin: per row, the time in [0, 1] from which the model draws; 0 is the whole stage, 1 is nothing of it.
    """

    start: Tensor
    end: Tensor
    mask: Tensor
    begin: tuple[float, ...]

    @classmethod
    def given(cls, end: Tensor) -> Self:
        """y_k of every row, (B, C, h_k, w_k), taken as it is: nothing of the stage is drawn."""
        return cls(end, end, torch.zeros_like(end[:, :1]), (1.0,) * len(end))

    @staticmethod
    def join(parts: Sequence[Known | None], draws: Sequence[Tensor]) -> Known | None:
        """Rows of different edits, and of none (None), as one batch; None where all are.

        Args:
            parts: in the order of the batch.
            draws: fresh noise of the stage for the rows of each part: it tells their number and size.
        """
        if all(part is None for part in parts):
            return None
        filled = [
            Known(e, e, torch.ones_like(e[:, :1]), (0.0,) * len(e)) if part is None else part
            for part, e in zip(parts, draws, strict=True)
        ]
        starts, ends, masks = zip(*((part.start, part.end, part.mask) for part in filled), strict=True)
        begin = tuple(time for part in filled for time in part.begin)
        return Known(torch.cat(starts), torch.cat(ends), torch.cat(masks), begin)

    def select(self, rows: list[int]) -> Known:
        """Some of the rows."""
        return Known(self.start[rows], self.end[rows], self.mask[rows], tuple(self.begin[row] for row in rows))

    def to(self, device: torch.device) -> Known:
        """The same on a device."""
        return replace(self, start=self.start.to(device), end=self.end.to(device), mask=self.mask.to(device))

    @property
    def complete(self) -> bool:
        """Whether no row draws anything in this stage."""
        return all(begin >= 1 for begin in self.begin)

    def steps_before(self, steps: int) -> int:
        """Of ``steps`` equal steps, those that end before any row draws."""
        return min(int(min(self.begin) * steps + 1e-6), steps - 1)

    def at(self, t: float) -> Tensor:
        """The known path at t, (B, C, h_k, w_k)."""
        return torch.lerp(self.start, self.end, t)

    def enter(self, x: Tensor) -> Tensor:
        """Start of the stage: ``x`` (from the jump) where rows draw from the first step on, else x_k^{0*}."""
        return self._blend(self.start, x, [float(begin <= 0) for begin in self.begin])

    def hold(self, x: Tensor, now: float, then: float) -> Tensor:
        """After a solver step: the known path outside the mask, and for the part of the step before ``begin``.

        A row that begins between ``now`` and ``then`` moves along its path until then, and with the solver's slope
        after: with it, the result is continuous in ``begin``.
        """
        shares = [min(1.0, max(0.0, (then - begin) / (then - now))) for begin in self.begin]
        return self._blend(self.at(then), x, shares)

    def _blend(self, known: Tensor, x: Tensor, shares: list[float]) -> Tensor:
        weight = self.mask * self.mask.new_tensor(shares).view(-1, 1, 1, 1)
        return torch.lerp(known, x.to(known), weight)
