"""Passes that are recorded and replayed are the passes themselves; only CUDA's recorder needs CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conftest import random_model, tiny_config
from ecar import Pipeline
from ecar.config import SamplingConfig
from ecar.network.model import ECAR
from ecar.sampling.graphs import CudaRecorder, GraphedHead, graph_head
from ecar.sampling.loop import sample_latents
from ecar.sampling.noise import draw_noise
from ecar.tokenizers import PixelTokenizer


class SameMemory:
    """Behaves as a CUDA graph does: replays read the tensors of the recording and write over its one output."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        out = torch.full_like(run(), torch.nan)

        def replay() -> None:
            out.copy_(run())

        return replay, out


def sample(model: ECAR, labels: list[int], *, guidance: float = 1.0) -> Tensor:
    device, settings = model.device, SamplingConfig(steps=(3, 2, 2), guidance=(guidance, guidance, 1.0), solver="ab2")
    noise = draw_noise([7 + label for label in labels], model.plan, model.config.channels)
    return sample_latents(model, torch.tensor(labels, device=device), noise, settings)


def test_replayed_passes_are_fresh_ones_for_other_rows_classes_and_guidance() -> None:
    plain, graphed, record = random_model(tiny_config()), random_model(tiny_config()), SameMemory()
    graph_head(graphed, record)
    graph_head(graphed, record)  # a second time changes nothing
    for labels, guidance in (([0, 1], 1.0), ([2, 0], 1.0), ([1], 1.0), ([1], 1.5), ([2], 1.5)):
        expected, got = (sample(model, labels, guidance=guidance) for model in (plain, graphed))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    # three stages of two rows and of one; guided, one row is two in the coarse stages and one in the last
    assert record.recorded == 6


def test_a_velocity_that_a_solver_remembers_is_not_written_over(model: ECAR) -> None:
    head = GraphedHead(model.head.forward, SameMemory())
    stage, labels = model.plan[0], torch.tensor([0])
    with torch.no_grad():
        embedded = model.head.embed_tokens(stage, torch.randn(1, 6, model.config.width))
        conditioning = model.head.conditioning(stage, torch.zeros(1), labels)
        first = head(stage, torch.randn(1, 3, 2, 3), conditioning, embedded)
        before = first.clone()
        head(stage, torch.randn(1, 3, 2, 3), conditioning, embedded)
    assert torch.equal(first, before)


def test_previews_of_padded_batches_meet_recorded_sizes_only() -> None:
    """The velocity of a preview was computed for the unpadded rows: a recording, or a compilation, for each count."""
    pipe, record = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1), "tiny"), SameMemory()
    graph_head(pipe.model, record)
    pipe.fixed_shapes = True
    stages = [pipe([0] * count, return_stages=True).stages for count in (5, 6, 7, 8)]
    assert [[len(previews) for previews in one] for one in stages] == [[n] * 3 for n in (5, 6, 7, 8)]
    assert record.recorded == 3  # eight rows in each stage


def test_with_gradients_nothing_is_recorded(model: ECAR) -> None:
    record = SameMemory()
    head = GraphedHead(model.head.forward, record)
    stage = model.plan[0]
    conditioning = model.head.conditioning(stage, torch.zeros(1), torch.tensor([0]))
    embedded = model.head.embed_tokens(stage, torch.randn(1, 6, model.config.width))
    assert head(stage, torch.randn(1, 3, 2, 3), conditioning, embedded).requires_grad
    assert record.recorded == 0


def test_cuda_graphs_without_cuda_are_refused() -> None:
    with pytest.raises(ValueError, match="need a CUDA device, and the model is on cpu"):
        Pipeline.from_pretrained("fashion", device="cpu", cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_give_the_samples_of_plain_launches(compile: bool) -> None:
    plain, graphed = (random_model(tiny_config()).cuda() for _ in range(2))
    graph_head(graphed, CudaRecorder())
    if compile:
        graphed.compile_blocks()
    for labels in ([0, 1], [2, 0], [1]):
        torch.testing.assert_close(sample(graphed, labels), sample(plain, labels), atol=1e-3, rtol=1e-3)
