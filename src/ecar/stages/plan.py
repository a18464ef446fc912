"""The stage plan: sides and data levels a_k -> b_k of every stage (Eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

from ecar.config import Side, StageConfig, start_level


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        index: k - 1, from 0.
        side: (height, width) of its map.
        start: a_k, share of data at t = 0.
        end: b_k, share of data at t = 1.
        jump: a_k / b_{k-1}, scale of the previous map in Eq. 5; 0 for the first stage.
        rho: share of the coarse noise that is kept.
        patch: side of the squares of positions that trunk and head read as one token.
    """

    index: int
    side: Side
    start: float
    end: float
    jump: float
    rho: float
    patch: int = 1

    @property
    def grid(self) -> Side:
        """(height, width) of the stage in tokens."""
        return self.side[0] // self.patch, self.side[1] // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of the map."""
        return self.grid[0] * self.grid[1]


def make_plan(config: StageConfig, patch: int = 1) -> tuple[Stage, ...]:
    """All stages, coarse to fine; ``patch`` must divide every side."""
    plan: list[Stage] = []
    for index, (side, end) in enumerate(zip(config.sides, config.ends, strict=True)):
        start = start_level(config.ends[index - 1], config.rho) if index else 0.0
        jump = start / config.ends[index - 1] if index else 0.0
        plan.append(Stage(index=index, side=side, start=start, end=end, jump=jump, rho=config.rho, patch=patch))
    return tuple(plan)
