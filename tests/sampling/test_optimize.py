"""Faster is the same: packed products, compiled pipelines, padded batches."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from conftest import tiny_config
from ecar import Pipeline
from ecar.config import SamplingConfig
from ecar.devices import computes_bfloat16
from ecar.network.positions import rotary_table
from ecar.pretrained.build import build_model
from ecar.sampling import optimize as module
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import StageNoise, draw_noise
from ecar.sampling.optimize import PackedLinear
from ecar.stages import make_plan


def pixels(pipe: Pipeline, count: int) -> np.ndarray:
    images = pipe(list(range(count)), steps=(2, 1)).images
    return np.stack([np.asarray(image, np.float32) for image in images])


@pytest.mark.skipif(not computes_bfloat16("cpu"), reason="this CPU has no bfloat16 products")
def test_packed_product_is_the_product() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 160, dtype=torch.bfloat16)
    packed = PackedLinear(linear)
    for rows in (1, 7, 300):
        x = torch.randn(2, rows, 96).bfloat16()
        assert torch.allclose(packed(x).float(), linear(x).float(), atol=0.02)


@pytest.mark.skipif(not computes_bfloat16("cpu"), reason="this CPU has no bfloat16 products")
def test_weights_go_with_their_module() -> None:
    gc.collect()
    before = len(module._held)
    layer = PackedLinear(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    assert len(module._held) == before + 1
    del layer
    gc.collect()
    assert len(module._held) == before


def test_a_compiled_pipeline_makes_nearly_the_same_images_at_any_count() -> None:
    plain = pixels(Pipeline.from_pretrained("fashion"), 3)
    fast = Pipeline.from_pretrained("fashion", dtype=torch.bfloat16, compile=True)
    images = pixels(fast, 3)  # three: compiled code pads to four
    assert images.shape == plain.shape and 0 < np.abs(images - plain).mean() < 1
    stages = fast(["Bag"] * 3, steps=(2, 1), return_stages=True).stages
    assert [len(s) for s in stages] == [3, 3]


def test_sampling_reads_no_value_back_from_the_device() -> None:
    """On a GPU every read is a wait. Fake tensors have no values: reading one raises."""
    with FakeTensorMode():
        model = build_model(tiny_config()).eval()
        noise = []
        for stage in model.plan:
            shape = (2, model.config.channels, *stage.side)
            before = (2, model.config.channels, stage.side[0] // 2, stage.side[1] // 2)
            noise.append(StageNoise(torch.empty(shape), torch.empty(before) if stage.index else None))
        count = len(model.plan)
        settings = SamplingConfig(steps=(2,) * count, guidance=(1.5,) * count, solver="ab2")
        z = sample_latents(model, torch.zeros(2, dtype=torch.int64), noise, settings)
        assert z.shape == (2, model.config.channels, *model.plan[-1].side)


def test_no_tensor_comes_from_the_host_while_stages_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such a copy waits for all that was started before it. Only the noise is copied, before stage 1."""
    copies: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, device = getattr(func, "__name__", str(func)), (kwargs or {}).get("device")
            made = name in ("tensor", "as_tensor") and device is not None
            moved = name == "to" and args[0].device.type == "cpu" and any("meta" in str(a) for a in args[1:])
            if made or moved:
                copies.append(name)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the device "meta"
    config = tiny_config()
    noise = draw_noise([0, 1], make_plan(config.stages), config.channels)
    model = build_model(config).to("meta").eval()
    settings = SamplingConfig(steps=(3, 2, 2), guidance=(1.5, 1.5, 1.0), solver="ab2", guidance_from=(0.5, 0.0, 0.0))
    with Watch():
        sample_latents(model, torch.zeros(2, dtype=torch.int64, device="meta"), noise, settings)
    assert copies == ["to"] * 5  # three fresh, two context


def test_blocks_compile_without_a_graph_break() -> None:
    model = build_model(tiny_config()).eval()
    x, width = torch.randn(2, 16, model.config.width), model.config.width
    for block in (model.trunk.blocks[0], model.head.blocks[0]):
        table = rotary_table((4, 4), (4, 4), width // model.config.heads, x.device)
        whole = torch.compile(block, fullgraph=True, backend="eager")  # fullgraph: a break raises
        with torch.no_grad():
            modulation = torch.randn(2, 1, 6 * width)
            assert torch.allclose(whole(x, modulation, table), block(x, modulation, table), atol=1e-5)
