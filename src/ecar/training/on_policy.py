"""On-policy contexts against exposure bias: some images of a batch read maps that the model itself made.

For stages k = 1 .. S-1 of such an image: from the point on its path at a time t0, the model moves to the end of the
stage; its y^_k takes the place of y_k where trunk and jump of stage k + 1 read it. The end y_{k+1} that stage k + 1 has
to reach stays the true one, so its velocity y_{k+1} - jump(y^_k) also makes good what the model did wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecar.network.model import StageModel
from ecar.sampling.solvers import adams_bashforth2, uniform_grid
from ecar.stages import PathSample, Stage, end_point, jump, path_between, start_point

if TYPE_CHECKING:
    from ecar.training.loss import Draws

STEPS = 4  # of the solver, from t0 to 1


@torch.no_grad()
def own_ends(
    model: StageModel, maps: list[Tensor], noise: list[Tensor], labels: Tensor, draws: Draws, rows: tuple[int, ...]
) -> list[Tensor]:
    """y_1 .. y_{S-1}, each (B, C, h_k, w_k): those of the images in ``draws.on_policy`` as the model makes them.

    Args:
        model: weights as they are now; no gradient flows through this.
        maps: z_1 .. z_S.
        noise: n_1 .. n_S.
        labels: (B,) class ids, label dropout applied.
        draws: with ``on_policy`` and ``starts``.
        rows: images that train each stage; y_k is made for those that train stage k + 1.
    """
    assert draws.on_policy is not None and draws.starts is not None
    chosen = draws.on_policy.nonzero().squeeze(1)
    ends: list[Tensor] = []
    for stage in model.plan[:-1]:
        k = stage.index
        chosen = chosen[chosen < rows[k + 1]]
        end = end_point(stage, maps[k], noise[k])
        start = jump(stage, ends[-1][chosen], draws.noise[k][chosen]) if ends else noise[k][chosen]
        read = [y[chosen] + model.config.context_noise * c[chosen] for y, c in zip(ends, draws.context, strict=False)]
        # No cache: older versions of torch would use the weights cast here, without gradients, in the loss.
        kind = labels.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            made = _to_the_end(model, stage, read, labels[chosen], start, end[chosen], draws.starts[k][chosen])
        end[chosen] = made
        ends.append(end)
    return ends


def from_own_end(
    stage: Stage, z: Tensor, noise: Tensor, fresh: Tensor, end_before: Tensor, on_policy: Tensor, t: Tensor
) -> PathSample:
    """``interpolate`` for a batch in which some images start from the model's own y^_{k-1}.

    Args:
        stage: k > 1.
        z, noise: z_k and n_k, (B, C, h_k, w_k).
        fresh: e_k, of which n_k is made; so on the true y_{k-1} both starts are the same.
        end_before: y_{k-1} as the model made it, (B, C, h_{k-1}, w_{k-1}).
        on_policy: (B,) which images.
        t: (B,).
    """
    own = jump(stage, end_before, fresh)
    start = torch.where(on_policy.view(-1, 1, 1, 1), own, start_point(stage, z, noise))
    return path_between(start, end_point(stage, z, noise), t)


def _to_the_end(
    model: StageModel, stage: Stage, read: list[Tensor], labels: Tensor, start: Tensor, end: Tensor, t0: Tensor
) -> Tensor:
    """Solve dx/dt = v from the path's point at t0 (one per image) to t = 1: in s with t = t0 + (1 - t0) s."""
    embedded = model.head.embed_tokens(stage, model.trunk(read, labels)[-1])
    left = (1 - t0).view(-1, 1, 1, 1)

    def velocity(x: Tensor, s: float) -> Tensor:
        return left * model.velocity(stage, x, t0 + (1 - t0) * s, embedded, labels)

    return adams_bashforth2(velocity, path_between(start, end, t0).x, uniform_grid(STEPS))
