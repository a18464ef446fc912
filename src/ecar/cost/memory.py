"""Memory of sampling without allocating any: the sampler runs on fake tensors, and what is alive is counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecar.config import ModelConfig, SamplingConfig
from ecar.pretrained.build import build_model
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import StageNoise


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is on, and the most that were alive at once.

    Attributes:
        now: bytes alive.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._known.add(x.untyped_storage()._cdata)  # there before: weights, inputs, and views of them
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def sampling_memory(
    config: ModelConfig, settings: SamplingConfig, batches: Sequence[int], dtype: torch.dtype
) -> dict[str, dict[str, int]]:
    """Bytes while so many images are sampled at once, the decoder not: ``weights``, and at the worst moment ``cache and
    activations``; ``total``.

    What kernels use inside, and what an allocator holds back, comes on top. Compiled code needs less.
    """
    if not config.has_trunk:  # DiT keeps nothing from step to step but what the solver does
        settings = replace(settings, steps=(min(2, settings.steps[0]),))
    result = {}
    with FakeTensorMode():
        with _default_dtype(dtype):  # fake weights cannot be cast
            model = build_model(config).eval()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        for batch in batches:
            maps = [torch.empty(batch, config.channels, *stage.side) for stage in model.plan]
            noise = [StageNoise(x, before) for x, before in zip(maps, [None, *maps[:-1]], strict=True)]
            with LiveBytes() as live:
                sample_latents(model, torch.zeros(batch, dtype=torch.int64), noise, settings)
            most = live.peak
            result[f"batch {batch}"] = {"weights": weights, "cache and activations": most, "total": weights + most}
    return result
