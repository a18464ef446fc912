"""Faster sampling of a trained model: blocks compiled, weights packed for the CPU's matrix unit.

oneDNN brings a plain weight into its own order in every call, which at few rows costs more than the product; a packed
weight is in that order already. Packed weights are opaque to the compiler, so they travel as keys through custom ops.
"""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ecar.devices import computes_bfloat16
from ecar.network.model import StageModel
from ecar.sampling.graphs import graph_head

_ROWS = 256  # packing asks for a typical number of rows
_MIN_WEIGHTS = 1 << 12  # smaller layers cost nothing
_keys = itertools.count()
_held: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # packed weights; the modules own them


@torch.library.custom_op("ecar::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, key: Tensor, out: int) -> Tensor:
    assert out > 0
    return torch.ops.mkldnn._linear_pointwise(x, _held[int(key)], None, "none", [], "")


@_packed_linear.register_fake
def _(x: Tensor, key: Tensor, out: int) -> Tensor:
    del key
    return x.new_empty(*x.shape[:-1], out)


class PackedLinear(nn.Module):
    """The same product as ``linear``, its bfloat16 weight in oneDNN's order: (..., in) -> (..., out).

    The weight is held elsewhere; ``weight`` is empty and tells the type only.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS)
        self.out, key = linear.out_features, next(_keys)
        _held[key] = self.packed
        self.register_buffer("key", torch.tensor(key), persistent=False)
        self.register_buffer("weight", linear.weight.detach().new_empty(0), persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _packed_linear(x, self.key, self.out)
        return y if self.bias is None else y + self.bias


def optimize(model: StageModel, *, compile: bool = False, cuda_graphs: bool = False) -> None:
    """Make sampling with ``model`` faster, in place; its weights can then no longer be trained or saved.

    Args:
        model: in its final type and on its device.
        compile: compile the blocks (on CPU this needs g++; a minute at first use, again for another batch size).
            bfloat16 weights on CPU are packed too.
        cuda_graphs: the head's passes recorded and replayed, see ``ecar.sampling.graphs``; on CUDA only.

    Raises:
        ValueError: CUDA graphs elsewhere than on CUDA.
    """
    if cuda_graphs:
        graph_head(model)  # its check comes first; nothing is recorded before the first pass
    if compile:
        if model.device.type == "cpu" and model.dtype == torch.bfloat16 and computes_bfloat16(model.device):
            _pack(model.blocks)
        model.compile_blocks()


def padded_count(count: int) -> int:
    """Rows of a batch of ``count`` images with fixed shapes: compiled code is of one size, and one of 1, 2, 4, 8, 12,
    16, 24, 32, 48, ... serves many counts."""
    power = 1 << (count - 1).bit_length()
    between = 3 * power // 4  # half-way from the power before; of few rows, the filling costs little
    return between if power >= 16 and count <= between else power


def _pack(modules: list[nn.Module]) -> None:
    for module in modules:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= _MIN_WEIGHTS:
                setattr(module, name, PackedLinear(child))
            else:
                _pack([child])
