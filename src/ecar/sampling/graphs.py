"""CUDA graphs: the head's pass of each stage is recorded once and replayed after that.

A step then launches one graph where it launched some hundred kernels, which at few rows takes longer than what these
compute. The trunk runs once a stage and writes into its cache: it is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ecar.network.model import StageModel
from ecar.stages import Stage

Pass = Callable[[], Tensor]
Record = Callable[[Pass], tuple[Callable[[], None], Tensor]]


class CudaRecorder:
    """Records passes as CUDA graphs, all in one pool of memory: no two of them ever run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> tuple[Callable[[], None], Tensor]:
        """What replays ``run``, and the output that each replay writes anew."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and lets the libraries choose their kernels: neither can be recorded
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], None]
    out: Tensor


class GraphedHead:
    """Stands for the ``forward`` of a flow head; with gradients it is that ``forward``.

    There is one recording per stage and shape of inputs, so a caller keeps to few numbers of rows.

    Args:
        forward: of the head: (stage, x, conditioning, embedded) -> velocity.
        record: how a pass is recorded.
    """

    def __init__(self, forward: Callable[..., Tensor], record: Record) -> None:
        self._forward, self._record = forward, record
        self._recordings: dict[tuple[Any, ...], _Recording] = {}

    def __call__(self, stage: Stage, x: Tensor, conditioning: Any, embedded: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._forward(stage, x, conditioning, embedded)
        given = tree_leaves((x, conditioning, embedded))
        key = (stage.index, *(tensor.shape for tensor in given))
        if key not in self._recordings:
            held = tree_map(torch.clone, (x, conditioning, embedded))
            replay, out = self._record(lambda: self._forward(stage, *held))
            self._recordings[key] = _Recording(tree_leaves(held), replay, out)
        recording = self._recordings[key]
        torch._foreach_copy_(recording.inputs, given)
        recording.replay()
        return recording.out.clone()  # the next replay writes over it, and a solver remembers velocities


def graph_head(model: StageModel, record: Record | None = None) -> None:
    """Let the head of ``model`` replay CUDA graphs, in place.

    Raises:
        ValueError: the model is not on a CUDA device.
    """
    if isinstance(model.head.forward, GraphedHead):
        return
    if record is None:
        if model.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, and the model is on {model.device.type}")
        record = CudaRecorder()
    model.head.forward = GraphedHead(model.head.forward, record)
