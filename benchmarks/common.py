"""What the benchmarks share: the machine, its clock and its peak, and how a result is written."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ecar.files.commit import source_commit


def write_result(record: dict[str, Any], out: Path | None) -> None:
    """The record, with the commit of the source, into ``out`` (folders are made), and as the last line printed."""
    record = {"commit": source_commit(), **record}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures of a record depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``call`` takes on ``device``; on CUDA between two events, so that the host's share of starting and
    waiting is not in it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def matmul_peak(dtype: torch.dtype, device: str, size: int = 4096, repeats: int = 5) -> float:
    """TFLOP/s that one large square matrix product reaches: what the machine can do."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [seconds_of(lambda: a @ b, a.device) for _ in range(repeats + 1)]
    return 2 * size**3 / min(times[1:]) / 1e12


def coarse_guidance(scale: float, stages: int) -> tuple[float, ...]:
    """Guidance of every stage but the last, whose many tokens a second pass would cost most; a single stage is
    guided."""
    return (scale,) * max(1, stages - 1) + (1.0,) * (stages > 1)
