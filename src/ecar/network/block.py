"""The transformer block of trunk and head: adaLN-zero modulation, QK-normalised attention, SwiGLU.

Shapes: B batch, N tokens, D width. Modulation is (B, G, 6 D): one row per group of tokens (stage), never per token.
Blocks are what is compiled: their arguments are tensors, so that all blocks of a shape share one graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ecar.network.positions import rotate

Memory = tuple[Tensor, Tensor]

# On CPU the backward pass of scaled_dot_product_attention in bfloat16 takes several times as long as explicit
# products while the score matrix is small (measured; it crosses over near this many keys). Forward alone it is faster
# at any size.
EXPLICIT_BELOW = 512


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (1910.07467); the sum of squares is float32."""

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        # No float32 copy of x: in bfloat16 on CPU that costs several times the products themselves.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + 1e-6)
        normed = x * scale.to(x.dtype)
        return normed if self.weight is None else normed * self.weight.to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention: q (B, heads, N, d), k and v (B, heads, M, d), mask (N, M) True where allowed."""
    if q.device.type == "cpu" and k.shape[2] < EXPLICIT_BELOW and torch.is_grad_enabled():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention with QK-RMSNorm and 2-D rotary positions: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.to_out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, N, D).
            table: rotary table of these N positions.
            mask: (N, N), True where a token may look.
            memory: keys and values of earlier stages, seen by all, with N places behind them, which are filled here;
                with it there is no mask.
        """
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        if memory is not None:
            keys, values = memory
            keys[:, :, -x.shape[1] :], values[:, :, -x.shape[1] :] = k, v
            k, v = keys, values
        return self.to_out(rearrange(attention(q, k, v, mask), "b h n d -> b n (h d)"))


def hidden_width(width: int) -> int:
    """Of the gated feed-forward: 8/3 of the width, rounded up to 32."""
    return -(-8 * width // 3 // 32) * 32


class SwiGLU(nn.Module):
    """Gated feed-forward (2002.05202) with the parameters of a 4x perceptron: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = hidden_width(width)
        self.w_in, self.w_out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * value)


class Block(nn.Module):
    """x + gate * attention(mod(norm(x))), then the same with the feed-forward. Starts as the identity (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width, affine=False), RMSNorm(width, affine=False)
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulate(self, condition: Tensor) -> Tensor:
        """Activated condition (B, G, D) -> modulation (B, G, 6 D), in the type of the weights.

        Not autocast: it is per group, so float32 costs little in training, and keeps the residual stream precise.
        """
        with torch.autocast(condition.device.type, enabled=False):
            return self.modulation(condition.to(self.modulation.weight.dtype))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        table: Tensor,
        *,
        groups: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: (B, N, D).
            modulation: (B, G, 6 D) of ``modulate``.
            table: rotary table (2, N, head_dim / 2).
            groups: (N,) the row of ``modulation`` of each token; None: there is one row for all.
            mask: (N, N), True where allowed.
            memory: keys and values (B, heads, M, head_dim) of the stages before, with N free places at the end that
                this call fills; not together with ``mask``.
        """
        if groups is not None:
            modulation = modulation[:, groups]  # (B, N, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (B, 1 or N, D)
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1).to(x.dtype)
        x = torch.addcmul(x, gate1, self.attention(h, table, mask, memory)).to(x.dtype)
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2).to(x.dtype)
        return torch.addcmul(x, gate2, self.mlp(h)).to(x.dtype)


def initialize(module: nn.Module) -> None:
    """Xavier-uniform linears, zero biases, small embeddings; zero-initialised layers are set again by their owners."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    for part in module.modules():
        if isinstance(part, Block):
            nn.init.zeros_(part.modulation.weight)
