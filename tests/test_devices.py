"""Precision by device: bfloat16 only where it is computed, not imitated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import random_model, tiny_config
from ecar.devices import computes_bfloat16
from ecar.evaluation.extractors import get_extractor
from ecar.evaluation.features import EfficientNetLite
from ecar.pretrained.folders import save_model
from ecar.tokenizers.pixels import PixelTokenizer
from ecar.training.adversary import Adversary
from ecar.training.engine.optim import orthogonal


@pytest.fixture(params=[False, True])
def computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU that imitates bfloat16, and one that computes it."""
    answer: bool = request.param
    cpu(monkeypatch, computes=answer)
    return answer


def cpu(monkeypatch: pytest.MonkeyPatch, *, computes: bool, machine: str = "x86_64", onednn: bool = True) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: computes)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)


def test_a_xeon_with_avx512_but_without_its_bfloat16_imitates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN calls bfloat16 supported there; the product of two matrices took five times as long as in float32."""
    cpu(monkeypatch, computes=False)
    assert not computes_bfloat16("cpu")
    cpu(monkeypatch, computes=True)
    assert computes_bfloat16("cpu")
    for answer in (False, True):
        cpu(monkeypatch, computes=False, machine="aarch64", onednn=answer)
        assert computes_bfloat16("cpu") is answer


def test_networks_run_in_float32_on_a_cpu_that_imitates_bfloat16(
    computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and the autoencoder's training took twelve times as long there."""
    seen = set()

    def convolution(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        on = torch.is_autocast_enabled("cpu")
        seen.add(torch.get_autocast_dtype("cpu") if on else torch.float32)
        return original(x, *_, **__)  # type: ignore[arg-type]

    original = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", convolution)
    EfficientNetLite(0).of_pixels(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 32)
    Adversary(0.2, "cpu", 0).learn(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    assert seen == {torch.bfloat16 if computes else torch.float32}


def test_muon_keeps_float32_on_a_cpu_that_imitates_bfloat16(computes: bool) -> None:
    updates = orthogonal(torch.randn(1, 8, 4), (3.4445, -4.7750, 2.0315), 2, 1e-7)
    assert updates.dtype == (torch.bfloat16 if computes else torch.float32)


def test_features_of_another_precision_are_another_extractor(computes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached references of one would be compared with samples of the other."""
    ours = get_extractor("efficientnet-lite0").fingerprint
    cpu(monkeypatch, computes=not computes)
    assert get_extractor("efficientnet-lite0").fingerprint != ours


def test_sample_says_which_precision_it_used(
    computes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dtype bf16, which the README recommends, was six times slower than nothing there, and silently."""
    from ecar.cli.main import main

    save_model(tmp_path / "model", random_model(tiny_config()), PixelTokenizer(factor=1))
    assert main(["sample", str(tmp_path / "model"), "--dtype", "bf16", "--out", str(tmp_path / "a.png")]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["dtype"] == ("bf16" if computes else "fp32")
    assert ("imitates bfloat16" in told.err) == (not computes)


def test_a_gpu_without_bfloat16_is_not_given_any(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def supported(*, including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return False

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not computes_bfloat16("cuda") and asked == [False]
