"""The engine as a thread: who gets which pixels, and who gets an error when something breaks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_model, tiny_config
from ecar.sampling.pipeline import Pipeline
from ecar.serving import engine as engine_module
from ecar.serving.config import Limits
from ecar.serving.engine import Engine
from ecar.serving.job import Job
from ecar.serving.metrics import Metrics
from ecar.serving.order import make_order
from ecar.serving.previews import preview_points
from ecar.serving.rows import EngineError, Event, Failed, Finished, Preview, Row
from ecar.serving.schema import GenerateRequest
from ecar.tokenizers import PixelTokenizer


def pipeline() -> Pipeline:
    return Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))


class Gate:
    """Stops the engine before each batch until it is told to go on."""

    def __init__(self, pipe: Pipeline) -> None:
        self.turns, self.waiting, self.open = threading.Semaphore(0), threading.Semaphore(0), False
        step = pipe.model.trunk.step

        def gated(*arguments: object) -> torch.Tensor:
            if not self.open and threading.current_thread().name == "ecar-engine":
                self.waiting.release()
                self.turns.acquire()
            return step(*arguments)

        pipe.model.trunk.step = gated

    def release(self) -> None:
        self.open = True
        self.turns.release(100)


@contextmanager
def running(pipe: Pipeline, **limits: object) -> Iterator[Engine]:
    loads = iter([pipe])
    engine = Engine(lambda: next(loads, None) or pipeline(), Limits(**limits), Metrics())  # type: ignore[arg-type]
    engine.start()
    until(lambda: engine.state == "ready")
    try:
        yield engine
    finally:
        engine.stop()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class Asked:
    """A row and what came back."""

    def __init__(self, pipe: Pipeline, label: int, seed: int, previews: int = 0, **changes: object) -> None:
        settings = pipe.settings(**changes)  # type: ignore[arg-type]
        self.events: list[Event] = []
        self.row = Row(label, seed, settings, self.events.append, preview_points(settings.steps, previews))

    @property
    def done(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)

    def pixels(self) -> np.ndarray:
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return np.asarray(last.image).astype(int)

    def error(self) -> EngineError:
        last = self.events[-1]
        assert isinstance(last, Failed), last
        return last.error


def difference(a: np.ndarray, b: Image.Image) -> int:
    return int(np.abs(a - np.asarray(b).astype(int)).max())


def test_images_are_those_of_the_pipeline_whatever_the_neighbours() -> None:
    """The bound: one step of 255, where rounding falls the other way."""
    pipe = pipeline()
    asked = [Asked(pipe, i % 3, i, previews=i % 4, guidance=(1.0, 2.5)[i // 5 % 2]) for i in range(20)]
    with running(pipe, max_batch=4) as engine:
        for one in asked:
            engine.submit([one.row])
            time.sleep(0.002)  # they come while others are in progress
        until(lambda: all(one.done for one in asked))
    for i, one in enumerate(asked):
        alone = pipe([i % 3], seeds=[i], guidance=(1.0, 2.5)[i // 5 % 2]).images[0]
        assert difference(one.pixels(), alone) <= 1
    assert len({one.pixels().tobytes() for one in asked}) == 20


def test_compiled_model_meets_batches_of_the_warm_sizes_only_and_makes_the_same_images() -> None:
    """Any other size would stop the whole server for the compiler."""
    pipe = pipeline()
    pipe.fixed_shapes = True
    sizes: set[int] = set()
    for block in (*pipe.model.trunk.blocks, *pipe.model.head.blocks):
        block.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    asked = [Asked(pipe, i % 3, i, previews=i % 4, guidance=(1.0, 2.5)[i // 5 % 2]) for i in range(20)]
    gone = asked.pop(6)
    with running(pipe, max_batch=10) as engine:
        warm = set(sizes)
        engine.submit([one.row for one in asked[:7]] + [gone.row])
        gone.row.cancelled = True
        for one in asked[7:]:
            engine.submit([one.row])
            time.sleep(0.002)
        until(lambda: all(one.done for one in asked))
    assert sizes == warm == {1, 2, 4, 8, 12, 16, 24}
    for one in asked:
        alone = pipe([one.row.label], seeds=[one.row.seed], guidance=one.row.settings.guidance).images[0]
        assert difference(one.pixels(), alone) <= 1
    text = engine.metrics.text().decode()
    assert 'ecar_batch_size_sum{stage="3"} 19.0' in text  # rows that fill a batch are not counted, nor shown to anyone
    assert sum(len(one.events) for one in asked) == sum(1 + len(one.row.previews) for one in asked)


def test_late_rows_join_at_a_stage_boundary_and_early_ones_are_not_recomputed() -> None:
    pipe = pipeline()
    gate = Gate(pipe)
    gate.open = True
    with running(pipe) as engine:
        gate.open = False
        early, late = Asked(pipe, 0, 1), Asked(pipe, 1, 2)
        engine.submit([early.row])
        gate.waiting.acquire()  # the early row is in its first stage
        engine.submit([late.row])
        gate.release()
        until(lambda: early.done and late.done)
    text = engine.metrics.text().decode()
    assert 'ecar_batch_size_sum{stage="1"} 2.0' in text and 'ecar_batch_size_count{stage="1"} 2.0' in text
    assert 'ecar_batch_size_sum{stage="3"} 2.0' in text and 'ecar_batch_size_count{stage="3"} 1.0' in text
    assert difference(late.pixels(), pipe([1], seeds=[2]).images[0]) <= 1


def test_previews_come_in_order_before_the_image_and_only_to_those_who_asked() -> None:
    pipe = pipeline()
    asked = [Asked(pipe, 0, 5, previews=count, steps=4) for count in (0, 1, 3)]
    with running(pipe) as engine:
        engine.submit([one.row for one in asked])
        until(lambda: all(one.done for one in asked))
    for one, count in zip(asked, (0, 1, 3), strict=True):
        previews = [e for e in one.events if isinstance(e, Preview)]
        assert [p.number for p in previews] == list(range(count)) and len(one.events) == count + 1
        assert difference(one.pixels(), Image.fromarray(asked[0].pixels().astype(np.uint8))) <= 1
    stages = pipe([0], seeds=[5], steps=4, return_stages=True).stages
    last = asked[1].events[0]
    assert isinstance(last, Preview) and last.stage == 2
    assert difference(np.asarray(last.image).astype(int), stages[1][0]) <= 1


def test_preview_inside_a_stage_tends_to_the_end_of_the_stage() -> None:
    """It is an estimate of the data, not the noisy map."""
    pipe = pipeline()
    one = Asked(pipe, 0, 5, previews=3, steps=(8, 1, 1))
    one.row.previews = ((0, 2), (0, 7), (0, 8))
    with running(pipe) as engine:
        engine.submit([one.row])
        until(lambda: one.done)
    early, late, end = (np.asarray(e.image).astype(float) for e in one.events[:3])  # type: ignore[union-attr]
    assert np.abs(late - end).mean() < np.abs(early - end).mean()


def test_full_queue_refuses_whole_requests_and_says_when_to_come_back() -> None:
    pipe = pipeline()
    gate = Gate(pipe)
    gate.open = True
    with running(pipe, max_queue=10) as engine:
        gate.open = False
        engine.submit([Asked(pipe, 0, 0).row])
        gate.waiting.acquire()
        waiting = [Asked(pipe, 0, i) for i in range(8)]
        engine.submit([one.row for one in waiting])
        with pytest.raises(EngineError) as refused:
            engine.submit([Asked(pipe, 0, i).row for i in range(3)])
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        assert refused.value.retry_after is not None and refused.value.retry_after >= 1
        gate.release()
        until(lambda: all(one.done for one in waiting))


def test_cancelled_and_expired_rows_leave_at_the_next_boundary_and_are_not_computed() -> None:
    pipe = pipeline()
    gate = Gate(pipe)
    gate.open = True
    with running(pipe) as engine:
        gate.open = False
        gone, stays, expired = Asked(pipe, 0, 0), Asked(pipe, 1, 1), Asked(pipe, 2, 2)
        engine.submit([gone.row, stays.row])
        gate.waiting.acquire()
        expired.row.deadline = time.monotonic() - 1
        engine.submit([expired.row])
        gone.row.cancelled = True
        gate.release()
        until(lambda: stays.done and expired.done)
    assert not gone.events and expired.error().status == 504
    text = engine.metrics.text().decode()
    assert 'ecar_batch_size_sum{stage="1"} 2.0' in text  # the expired row never began
    assert 'ecar_batch_size_sum{stage="2"} 1.0' in text  # the cancelled one went no further
    assert difference(stays.pixels(), pipe([1], seeds=[1]).images[0]) <= 1


def test_an_image_that_is_not_finite_is_one_clear_error_for_its_row_alone() -> None:
    pipe = pipeline()
    with torch.no_grad():
        pipe.model.head.class_embedding.weight[1] = float("nan")
    bad, good = Asked(pipe, 1, 0), Asked(pipe, 0, 1)
    with running(pipe) as engine:
        engine.submit([bad.row, good.row])
        until(lambda: bad.done and good.done)
        assert engine.state == "ready"
    assert (bad.error().status, bad.error().code, bad.error().retry_after) == (500, "not_finite", None)
    assert len(bad.events) == 1 and difference(good.pixels(), pipe([0], seeds=[1]).images[0]) <= 1


def test_crash_gives_one_error_to_rows_in_progress_and_a_new_engine_to_those_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "BACKOFF", 0.01)
    pipe = pipeline()
    gate = Gate(pipe)
    gate.open = True
    with running(pipe) as engine:
        gate.open = False
        failing, waiting = Asked(pipe, 0, 0), Asked(pipe, 1, 1)
        engine.submit([failing.row])
        gate.waiting.acquire()
        engine.submit([waiting.row])

        def broken(*_: object) -> None:
            raise RuntimeError("device lost")

        pipe.model.head.embed_tokens = broken
        gate.release()
        until(lambda: failing.done and waiting.done)
        assert engine.state == "ready" and engine.pipe is not pipe
    assert (failing.error().status, failing.error().code, len(failing.events)) == (503, "engine_failed", 1)
    assert difference(waiting.pixels(), pipeline()([1], seeds=[1]).images[0]) <= 1
    assert "ecar_engine_restarts_total 1.0" in engine.metrics.text().decode()


def test_engine_that_keeps_crashing_gives_up_instead_of_looping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BACKOFF", 0.001)
    pipe = pipeline()
    pipe.model.head = torch.nn.Identity()
    engine = Engine(lambda: pipe, Limits(), Metrics())
    engine.start()
    until(lambda: engine.state == "failed")
    with pytest.raises(EngineError, match="failed"):
        engine.submit([Asked(pipeline(), 0, 0).row])


def test_out_of_memory_fails_one_batch_and_makes_later_ones_smaller() -> None:
    pipe = pipeline()
    with running(pipe) as engine:
        head, tokens = pipe.model.head, pipe.model.head.embed_tokens

        def small_device(stage: object, maps: torch.Tensor) -> torch.Tensor:
            if len(maps) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return tokens(stage, maps)

        head.embed_tokens = small_device
        first, second = ([Asked(pipe, 0, i) for i in range(4)] for _ in range(2))
        engine.submit([one.row for one in first])
        until(lambda: all(one.done for one in first))
        engine.submit([one.row for one in second])
        until(lambda: all(one.done for one in second))
        assert engine.state == "ready"
    assert {one.error().code for one in first} == {"out_of_memory"}
    assert all(isinstance(one.events[-1], Finished) for one in second)


def test_draining_engine_finishes_what_it_accepted_and_refuses_the_rest() -> None:
    pipe = pipeline()
    asked = [Asked(pipe, 0, i) for i in range(6)]
    with running(pipe, max_batch=2) as engine:
        engine.submit([one.row for one in asked])
        engine.drain()
        with pytest.raises(EngineError) as refused:
            engine.submit([Asked(pipe, 0, 9).row])
        assert (refused.value.status, refused.value.code) == (503, "shutting_down")
        until(lambda: all(one.done for one in asked))
    assert all(isinstance(one.events[-1], Finished) for one in asked)


def test_stop_answers_rows_that_are_left_once() -> None:
    pipe = pipeline()
    gate = Gate(pipe)
    gate.open = True
    with running(pipe) as engine:
        gate.open = False
        asked = [Asked(pipe, 0, i) for i in range(3)]
        engine.submit([asked[0].row])
        gate.waiting.acquire()
        engine.submit([one.row for one in asked[1:]])
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        gate.release()
        stopper.join(10)
    assert [one.error().code for one in asked] == ["shutting_down"] * 3
    assert all(len(one.events) == 1 for one in asked)


def test_images_and_previews_come_from_the_decoder_that_was_asked_for() -> None:
    """With a tiny decoder, the server must not go on with the model's own."""
    pipe = pipeline()
    pipe.decoder = Inverted(factor=1)
    with running(pipe) as engine:
        asked = Asked(pipe, 0, 7, previews=2)
        engine.submit([asked.row])
        until(lambda: asked.done)
    own = np.asarray(pipeline()([0], seeds=[7]).images[0]).astype(int)
    assert np.abs(asked.pixels() + own - 255).max() <= 1
    assert np.abs(np.asarray(pipe([0], seeds=[7]).images[0]) + own - 255).max() <= 1
    shown = [np.asarray(e.image).astype(int) for e in asked.events if isinstance(e, Preview)]
    stages = pipeline()([0], seeds=[7], return_stages=True).stages
    assert any(
        np.abs(shown[-1] + np.asarray(s[0]) - 255).max() <= 1 for s in stages if s[0].size == shown[-1].shape[1::-1]
    )


class Inverted(PixelTokenizer):
    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        return -super().decode_raw(latents)


def test_who_reads_slowly_gets_images_that_were_ready_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline was held against images that had been waiting for their reader."""
    monkeypatch.setattr("ecar.serving.job.GRACE", 0.0)
    pipe = pipeline()

    async def read(engine: Engine) -> int:
        job = Job(engine, make_order(GenerateRequest(prompt=pipe.class_names[0], n=3), pipe, engine.limits))
        while job._events.qsize() < 3:
            await asyncio.sleep(0.01)
        job._deadline = time.monotonic() - 1
        return len([event async for event in job.events()])

    with running(pipe) as engine:
        assert asyncio.run(read(engine)) == 3


def test_a_draining_engine_is_not_ready_in_its_metrics_either() -> None:
    with running(pipeline()) as engine:
        before = engine.metrics.text()
        engine.drain()
        assert b"ecar_ready 1.0" in before and b"ecar_ready 0.0" in engine.metrics.text()
