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
        begin: (B, 1, h_k, w_k), float: the time in [0, 1] from which the model draws a position, which follows the path
            until then; 0 is the whole stage, 1 is nothing of it.
        first: per row, the earliest of ``begin``.
    """

    start: Tensor
    end: Tensor
    begin: Tensor
    first: tuple[float, ...]

    @classmethod
    def given(cls, end: Tensor) -> Self:
        """y_k of every row, (B, C, h_k, w_k), taken as it is: nothing of the stage is drawn."""
        return cls(end, end, torch.ones_like(end[:, :1]), (1.0,) * len(end))

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
            Known(e, e, torch.zeros_like(e[:, :1]), (0.0,) * len(e)) if part is None else part
            for part, e in zip(parts, draws, strict=True)
        ]
        starts, ends, begins = zip(*((part.start, part.end, part.begin) for part in filled), strict=True)
        first = tuple(time for part in filled for time in part.first)
        return Known(torch.cat(starts), torch.cat(ends), torch.cat(begins), first)

    def select(self, rows: list[int]) -> Known:
        """Some of the rows."""
        return Known(self.start[rows], self.end[rows], self.begin[rows], tuple(self.first[row] for row in rows))

    def to(self, device: torch.device) -> Known:
        """The same on a device."""
        return replace(self, start=self.start.to(device), end=self.end.to(device), begin=self.begin.to(device))

    @property
    def complete(self) -> bool:
        """Whether no row draws anything in this stage."""
        return all(time >= 1 for time in self.first)

    def steps_before(self, steps: int) -> int:
        """Of ``steps`` equal steps, those that end before any row draws."""
        return min(int(min(self.first) * steps + 1e-6), steps - 1)

    def at(self, t: float) -> Tensor:
        """The known path at t, (B, C, h_k, w_k)."""
        return torch.lerp(self.start, self.end, t)

    def enter(self, x: Tensor) -> Tensor:
        """Start of the stage: ``x`` (from the jump) at positions that are drawn from the first step on, else
        x_k^{0*}."""
        return torch.where(self.begin <= 0, x.to(self.start), self.start)

    def hold(self, x: Tensor, now: float, then: float) -> Tensor:
        """After a solver step: the known path, for the part of the step before ``begin``.

        A position that begins between ``now`` and ``then`` moves along its path until then, and with the solver's slope
        after: with it, the result is continuous in ``begin``.
        """
        drawn = ((then - self.begin) / (then - now)).clamp(0, 1)
        return torch.lerp(self.at(then), x.to(self.end), drawn)
