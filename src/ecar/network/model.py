"""ECAR: trunk and head as one model."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ecar.config import ModelConfig
from ecar.network import Trunk
from ecar.network.head import Head
from ecar.stages import Stage, make_plan


class StageModel(nn.Module):
    """p(image | class) = prod_k p(y_k | y_<k, class): ``trunk`` gives M_k, ``head`` the velocity of stage k.

    Args:
        config: sizes, stage plan, class table.
        trunk: ``Trunk``, or what takes its place.
        head: ``Head``, or what takes its place.
    """

    trunk: Any
    head: Any

    def __init__(self, config: ModelConfig, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.plan = make_plan(config.stages, config.patch)
        self.trunk, self.head = trunk, head

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks: of the trunk, then of the head."""
        return cast(list[nn.Module], [*self.trunk.blocks, *self.head.blocks])

    @property
    def units(self) -> list[nn.Module]:
        """Modules that are called as one, where weights are cut over processes: every block, and before it the part of
        it that is called from outside."""
        return [unit for block in self.blocks for unit in (cast(nn.Module, block.modulation), block)]

    def velocity(
        self, stage: Stage, x: Tensor, t: Tensor, embedded: Tensor, labels: Tensor, conditioning: Any = None
    ) -> Tensor:
        """Velocity v_k at x_k^t, in units of the map (not normalised).

        Args:
            stage: a stage of the plan.
            x: (B, C, h_k, w_k), the point on the path.
            t: (B,) in [0, 1], or (1,) for one time for all.
            embedded: ``head.embed_tokens(stage, M_k)``, (B, n_k, D).
            labels: (B,) class ids; ``config.null_class`` is unconditional.
            conditioning: ``head.conditioning(stage, t, labels)`` where it is known already.

        Returns:
            (B, C, h_k, w_k), float32.
        """
        if conditioning is None:
            conditioning = self.head.conditioning(stage, t, labels)
        return self.head(stage, x, conditioning, embedded) * self.velocity_scale(stage)

    def velocity_scale(self, stage: Stage) -> float:
        """Standard deviation of the stage's velocity on the training data; 1 where it was not measured."""
        return self.config.velocity_std[stage.index] if self.config.velocity_std else 1.0

    def compile_blocks(self) -> None:
        """torch.compile every block, in place. All blocks share one graph per shape, so that starting takes a minute;
        the whole network as one graph takes several and runs no faster."""
        # One graph per kind of block, stage, row count and gradient mode; past the limit, blocks would run uncompiled.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 512
        for block in self.blocks:
            block.compile(dynamic=False)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())


class ECAR(StageModel):
    """The method itself: a block-causal trunk over stages and a head with joint attention."""

    trunk: Trunk
    head: Head

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Trunk(config), Head(config))
