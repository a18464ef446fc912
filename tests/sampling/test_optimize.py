"""Faster is the same: packed and int8 products, compiled pipelines, padded batches."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
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
from ecar.sampling.optimize import Int8Linear, PackedLinear
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_product_is_close_and_a_row_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 160, dtype=dtype)
    int8, x = Int8Linear(linear), torch.randn(3, 5, 96).to(dtype)
    error = (int8(x) - linear(x)).float().square().mean() / linear(x).float().square().mean()
    assert int8(x).dtype == dtype and 0 < float(error) < 1e-3
    huge = torch.cat([x, 1000 * x])
    assert torch.allclose(int8(huge)[:3].float(), int8(x).float(), atol=1e-6)


def test_int8_inputs_are_unsigned_since_signed_ones_crawl_on_most_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = Int8Linear(torch.nn.Linear(64, 64)), list[torch.Tensor]()

    def product(x: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(*x.shape[:-1], 64)

    monkeypatch.setattr(module, "_int8_linear", product)
    layer(torch.tensor([[-1.0, 1.0] * 32]))
    assert seen[0].dtype == torch.uint8 and seen[0].flatten()[:2].tolist() == [1, 2 * module._LEVELS + 1]


def test_int8_product_is_close_on_cpus_before_vnni() -> None:
    """There oneDNN adds pairs of products in 16 bits: eight-bit inputs overflowed, an error of a tenth."""
    code = (
        "import torch; torch.cpu._is_vnni_supported = lambda: False\n"
        "from ecar.sampling.optimize import Int8Linear\n"
        "torch.manual_seed(0); linear, x = torch.nn.Linear(1152, 64), torch.rand(16, 1152)\n"
        "print(float((Int8Linear(linear)(x) - linear(x)).square().mean() / linear(x).square().mean()))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert 0 < float(done.stdout) < 1e-3


@pytest.mark.skipif(not computes_bfloat16("cpu"), reason="this CPU has no bfloat16 products")
def test_int8_after_packing_is_refused_since_it_would_change_nothing() -> None:
    pipe = Pipeline.from_pretrained("fashion", dtype=torch.bfloat16, compile=True)
    with pytest.raises(ValueError, match="packed already"):
        pipe.optimize(quantize="int8")


def test_weights_go_with_their_module() -> None:
    gc.collect()
    before = len(module._held)
    layer = Int8Linear(torch.nn.Linear(64, 64))
    assert len(module._held) == before + 1
    del layer
    gc.collect()
    assert len(module._held) == before


def test_compiled_and_int8_pipelines_make_nearly_the_same_images_at_any_count() -> None:
    plain = pixels(Pipeline.from_pretrained("fashion"), 3)
    for options, most in (({"dtype": torch.bfloat16, "compile": True}, 1.0), ({"quantize": "int8"}, 2.0)):
        fast = Pipeline.from_pretrained("fashion", **options)
        images = pixels(fast, 3)  # three: compiled code pads to four
        assert images.shape == plain.shape and 0 < np.abs(images - plain).mean() < most
    stages = fast(["Bag"] * 3, steps=(2, 1), return_stages=True).stages
    assert [len(s) for s in stages] == [3, 3]


def test_unknown_quantization_is_refused() -> None:
    with pytest.raises(ValueError, match="must be int8"):
        Pipeline.from_pretrained("fashion", quantize="int2")


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
