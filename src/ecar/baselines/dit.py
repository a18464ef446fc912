"""DiT (2212.09748) as the baseline: diffusers' ``DiTTransformer2DModel`` under single-scale flow matching (2401.08740).

To trainer and sampler it is a model of one stage whose trunk emits nothing: x_1^0 = n, y_1 = z, v = z - n.
The network is diffusers' own; only its initialisation follows the paper, since diffusers leaves it to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecar.config import ModelConfig
from ecar.network import StageCache
from ecar.network.block import EXPLICIT_BELOW
from ecar.network.model import StageModel
from ecar.stages import Stage

TIME_SCALE = 1000.0  # DiT's time features are made for 0..1000


class NoTransformer(nn.Module):
    """Stands where ECAR has its trunk; its token map is empty, (B, 1, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    def forward(self, ends: list[Tensor], labels: Tensor) -> list[Tensor]:
        assert not ends, "one stage has no earlier maps"
        return [torch.zeros(len(labels), 1, 0, device=labels.device)]

    def step(self, stage: Stage, end_before: Tensor | None, labels: Tensor, cache: StageCache) -> Tensor:
        """The empty token map of the only stage."""
        assert end_before is None and stage.index == 0 and cache.length == 0
        return self([], labels)[0]

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> StageCache:
        """A cache without layers."""
        return StageCache(layers=0, batch=batch, heads=1, head_dim=1, tokens=0, device=device, dtype=dtype)


class DiTHead(nn.Module):
    """The denoiser in the place of the flow head: reads noisy map, time and class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        if config.num_classes < 1:
            raise ValueError("DiT needs classes; the data have no labels")
        self.network = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=config.channels,
            num_layers=config.head_depth,
            sample_size=config.stages.sides[-1][0],
            patch_size=config.patch,
            num_embeds_ada_norm=config.num_classes,
        )
        for block in self.network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # the trainer drops labels, once for all blocks
            block.attn1.set_processor(FastestProcessor())
        _initialize(self.network)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.network.transformer_blocks

    def embed_tokens(self, stage: Stage, tokens: Tensor) -> Tensor:
        """Nothing to embed."""
        assert stage.index == 0
        return tokens

    def conditioning(self, stage: Stage, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B,) or (1,) and class ids (B,) as they are: diffusers' blocks embed them themselves."""
        assert stage.index == 0
        return t.float().expand(len(labels)), labels

    def conditionings(self, stage: Stage, times: Sequence[float], labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``conditioning`` at each of several times."""
        return [self.conditioning(stage, torch.full((1,), t, device=labels.device), labels) for t in times]

    def forward(self, stage: Stage, x: Tensor, conditioning: tuple[Tensor, Tensor], embedded: Tensor) -> Tensor:
        """x (B, C, h, w), times and class ids (B,), an empty token map -> (B, C, h, w) float32."""
        assert stage.index == 0 and embedded.shape[-1] == 0
        times, labels = conditioning
        x = x.to(self.network.proj_out_2.weight.dtype)
        return self.network(x, TIME_SCALE * times, labels, return_dict=False)[0].float()


class FastestProcessor:
    """diffusers' attention by explicit products where these are faster (see network/block.py), else fused."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        self.explicit, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        short = hidden_states.device.type == "cpu" and hidden_states.shape[1] < EXPLICIT_BELOW
        processor = self.explicit if short and torch.is_grad_enabled() else self.fused
        return processor(attn, hidden_states, *args, **kwargs)


class DiT(StageModel):
    """DiT of ``config.head_depth`` blocks; ``config.trunk_depth`` must be 0 and there must be one stage.

    Raises:
        ValueError: more than one stage, a latent that is not square, or no classes.
    """

    def __init__(self, config: ModelConfig) -> None:
        if len(config.stages.sides) != 1:
            raise ValueError(f"DiT has one stage, not {len(config.stages.sides)}")
        super().__init__(config, NoTransformer(), DiTHead(config))

    @property
    def units(self) -> list[nn.Module]:
        """As everywhere; the last layer uses the embedder of the first block too."""
        return [unit for block in self.head.blocks for unit in (block.norm1.emb, block)]

    def compile_blocks(self) -> None:
        """As everywhere, but for training on CPU only attention and MLP: Inductor's backward of a whole block is NaN
        there in bfloat16 (torch 2.13, where it is vectorised)."""
        if not self.training or self.device.type != "cpu":
            return super().compile_blocks()
        for block in self.head.blocks:
            block.attn1.compile(dynamic=False)
            block.ff.compile(dynamic=False)


def _initialize(network: nn.Module) -> None:
    """As in the paper: Xavier-uniform linears, small embeddings, modulation and output start at zero."""
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
            if "timestep_embedder" in name:
                nn.init.normal_(part.weight, std=0.02)
            if name.endswith(("norm1.linear", "proj_out_1", "proj_out_2")):
                nn.init.zeros_(part.weight)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, nn.Conv2d):  # the patch embedding, as a linear layer
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
