"""Faster sampling of a trained model: blocks compiled, weights packed for the CPU's matrix unit or held in int8.

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
# int8 inputs are handed over unsigned, x / scale + levels + 1. Signed ones take oneDNN's reference product on CPUs
# without AMX, which is thousands of times slower (measured: 936 ms instead of 0.28 for 768 x 192 x 576); the result is
# the same. Before VNNI the product adds pairs in 16 bits, which 255 x 127 x 2 overflows: there, seven bits.
_LEVELS = 127 if torch.cpu._is_vnni_supported() else 63


class _Weights:
    """What a product needs beside x."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        self.weight, self.scale = weight, scale
        self.zero = None if scale is None else torch.zeros(len(scale), dtype=torch.int32)


_keys = itertools.count()
_held: WeakValueDictionary[int, _Weights] = WeakValueDictionary()  # the modules own them


@torch.library.custom_op("ecar::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, key: Tensor, out: int) -> Tensor:
    assert out > 0
    return torch.ops.mkldnn._linear_pointwise(x, _held[int(key)].weight, None, "none", [], "")


@_packed_linear.register_fake
def _(x: Tensor, key: Tensor, out: int) -> Tensor:
    del key
    return x.new_empty(*x.shape[:-1], out)


@torch.library.custom_op("ecar::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, key: Tensor, out: int, dtype: torch.dtype) -> Tensor:
    assert out > 0
    held = _held[int(key)]
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, _LEVELS + 1, held.weight, held.scale, held.zero, None, 1.0, 0, dtype, "none", [], ""
    )


@_int8_linear.register_fake
def _(x: Tensor, key: Tensor, out: int, dtype: torch.dtype) -> Tensor:
    del key
    return x.new_empty(*x.shape[:-1], out, dtype=dtype)


class _FastLinear(nn.Module):
    """A linear layer on CPU whose weight is held elsewhere; ``weight`` is empty and tells the type only."""

    def __init__(self, linear: nn.Linear, held: _Weights) -> None:
        super().__init__()
        self.held, self.out = held, linear.out_features
        key = next(_keys)
        _held[key] = held
        self.register_buffer("key", torch.tensor(key), persistent=False)
        self.register_buffer("weight", linear.weight.detach().new_empty(0), persistent=False)
        self.bias = linear.bias


class PackedLinear(_FastLinear):
    """The same product as ``linear``, its bfloat16 weight in oneDNN's order: (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS)
        super().__init__(linear, _Weights(packed))

    def forward(self, x: Tensor) -> Tensor:
        y = _packed_linear(x, self.key, self.out)
        return y if self.bias is None else y + self.bias


class Int8Linear(_FastLinear):
    """Weight in int8 with a scale per output, input rounded to int8 with a scale per row: (..., in) -> (..., out).

    One scale per row, not per batch: an image does not depend on its neighbours.
    """

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-8) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(rounded, [_ROWS, weight.shape[1]])
        super().__init__(linear, _Weights(packed, scale))

    def forward(self, x: Tensor) -> Tensor:
        # float first: torch 2.13 writes C++ that does not compile for several bfloat16 maxima of one tensor
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / _LEVELS
        y = _int8_linear(((x / scale).round() + (_LEVELS + 1)).to(torch.uint8), self.key, self.out, x.dtype) * scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def optimize(
    model: StageModel, *, compile: bool = False, quantize: str | None = None, cuda_graphs: bool = False
) -> None:
    """Make sampling with ``model`` faster, in place; its weights can then no longer be trained or saved.

    Args:
        model: in its final type and on its device.
        compile: compile the blocks (on CPU this needs g++; a minute at first use, again for another batch size).
            bfloat16 weights on CPU are packed too.
        quantize: "int8": the products of the blocks in int8; needs ``compile`` to be worth it. On CPU weights and
            inputs, through oneDNN; elsewhere weights only, through torchao.
        cuda_graphs: the head's passes recorded and replayed, see ``ecar.sampling.graphs``; on CUDA only.

    Raises:
        ValueError: unknown ``quantize``, a model whose weights are packed already, no torchao where it is needed, or
            CUDA graphs elsewhere than on CUDA.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be int8 or nothing, got {quantize!r}")
    if cuda_graphs:
        graph_head(model)  # its check comes first; nothing is recorded before the first pass
    blocks = [*model.trunk.blocks, *model.head.blocks]
    if quantize is not None and any(isinstance(m, _FastLinear) for block in blocks for m in block.modules()):
        raise ValueError("the weights are packed already; load the model again with compile and quantize together")
    if quantize is not None and model.device.type != "cpu":
        _quantize_with_torchao(blocks)
    elif quantize is not None:
        if not torch.backends.mkldnn.is_available():
            raise ValueError(f'quantize="{quantize}" on CPU needs a torch with oneDNN; this build has none')
        _replace(blocks, Int8Linear)
    elif compile and model.device.type == "cpu" and model.dtype == torch.bfloat16 and computes_bfloat16(model.device):
        _replace(blocks, PackedLinear)
    if compile:
        model.compile_blocks()


def padded_count(count: int) -> int:
    """Rows of a batch of ``count`` images with fixed shapes: compiled code is of one size, and one of 1, 2, 4, 8, 12,
    16, 24, 32, 48, ... serves many counts."""
    power = 1 << (count - 1).bit_length()
    between = 3 * power // 4  # half-way from the power before; of few rows, the filling costs little
    return between if power >= 16 and count <= between else power


def _quantize_with_torchao(blocks: list[nn.Module]) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError('quantize="int8" on this device needs torchao: pip install torchao') from None
    for block in blocks:
        quantize_(block, Int8WeightOnlyConfig())


def _replace(modules: list[nn.Module], kind: type[PackedLinear] | type[Int8Linear]) -> None:
    for module in modules:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= _MIN_WEIGHTS:
                setattr(module, name, kind(child))
            else:
                _replace([child], kind)
