"""The engine: one thread that owns the model and advances batches by one stage at a time.

The thread also loads the model, and nothing else computes with torch: on CPU every thread that does gets its own OpenMP
team, and a second team makes both slow (measured: 0.11 s instead of 0.05 s for one image of the bundled model, although
the first team only loaded it).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from ecar.pretrained.folders import critic_file, resolve_model
from ecar.refine import Critic, critic_of
from ecar.sampling.pipeline import Pipeline
from ecar.serving.compute import Computer
from ecar.serving.config import Limits
from ecar.serving.metrics import Metrics
from ecar.serving.rows import Chunk, EngineError, Failed, Row
from ecar.serving.scheduler import Scheduler

log = logging.getLogger("ecar.serving")
MAX_CRASHES = 5  # in a row, without a single batch between
BACKOFF = 0.5  # seconds before the first restart, doubling


def own_critic(model: str) -> Critic | None:
    """The critic in a model's folder; None where there is none, or, with a warning, one that cannot be used."""
    if critic_file(resolve_model(model)) is None:
        return None
    try:
        return critic_of(model)
    except ValueError as error:
        log.warning("no candidates are offered: %s", error)
        return None


class Engine:
    """Bounded queue in, events out.

    Args:
        load: makes the pipeline; called in the engine's thread, and again after a crash.
        limits: sizes, times.
        metrics: where it counts.
        load_critic: makes what chooses among candidates, where the limits allow some; None (or one that gives None):
            no candidates are offered.

    Attributes:
        state: starting (also: again, after a crash), ready, draining, failed, stopped.
        pipe: once started; for class names, plan and default settings, not for computing.
    """

    pipe: Pipeline
    critic: Critic | None = None

    def __init__(
        self,
        load: Callable[[], Pipeline],
        limits: Limits,
        metrics: Metrics,
        load_critic: Callable[[], Critic | None] | None = None,
    ) -> None:
        limits.check()
        self.limits, self.metrics, self.state = limits, metrics, "starting"
        metrics.ready.set_function(lambda: self.state == "ready")  # asked: a signal handler may not set it
        self._load, self._load_critic, self._scheduler = load, load_critic, Scheduler(limits.max_batch)
        self._running: list[Row] = []  # rows of the batch that is being computed
        self._changed = threading.Condition()
        self._stop = False
        self._seconds_per_image = 0.1
        self._loaded: Future[Pipeline] = Future()
        self._thread = threading.Thread(target=self._supervise, name="ecar-engine", daemon=True)

    def start(self) -> None:
        """Load the model and begin; once it is warm, ``state`` turns to ready. A second call does nothing.

        Raises:
            ValueError: and whatever else loading raises.
        """
        if not self._thread.ident:
            self._thread.start()
        self.pipe = self._loaded.result()

    def drain(self) -> None:
        """Take no new rows; what was accepted is finished. Takes no lock: signal handlers call it."""
        if self.state in ("starting", "ready"):
            self.state = "draining"

    def abandon(self) -> None:
        """Time for draining is up: rows that are left get one error each, and no further stage is computed."""
        log.warning("not everything could be finished in time")
        self._give_up(EngineError(503, "shutting_down", "the server shut down before the image was finished", 5))

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread at the next stage boundary; rows that are left get one error each."""
        with self._changed:
            self._stop = True
            self.state = "stopped"
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._give_up(EngineError(503, "shutting_down", "the server shut down before the image was finished", 5))

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue the rows of one request: all or none.

        Raises:
            EngineError: 429 queue_full, 503 while not ready or draining.
        """
        with self._changed:
            if self.state != "ready":
                code = "shutting_down" if self.state in ("draining", "stopped") else "not_ready"
                raise EngineError(503, code, f"the server takes no requests: it is {self.state}", 5)
            if len(self._scheduler.new) + len(rows) > self.limits.max_queue:
                self._sweep(begun=False)  # those whose clients went away hold no place; this is the event loop's thread
            waiting = len(self._scheduler.new)
            if waiting + len(rows) > self.limits.max_queue:
                seconds = min(60, max(1, math.ceil(waiting * self._seconds_per_image)))
                message = f"{waiting} images wait, and no more than {self.limits.max_queue} may; try again later"
                raise EngineError(429, "queue_full", message, seconds)
            self._scheduler.add(rows)
            self.metrics.queue_depth.set(len(self._scheduler.new))
            self._changed.notify()

    def _supervise(self) -> None:
        """Compute until stopped; after a crash load the model again."""
        try:
            self.pipe = self._load()
            self.limits.check_model(self.pipe.settings())
            self.critic = self._critic()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(self.pipe)
        crashes = 0
        while not self._stop:
            try:
                start = time.monotonic()
                computer = Computer(self.pipe, self.critic, self.metrics, self.limits)
                computer.warm_up()
                with self._changed:
                    if self.state == "starting":
                        self.state = "ready"
                log.info("ready after %.0f s of warming up", time.monotonic() - start)
                while self._work(computer):
                    crashes = 0
            except Exception as error:
                crashes += 1
                log.exception("engine crash %d", crashes)
                self._after_crash(error, crashes)
                if crashes >= MAX_CRASHES:
                    return

    def _critic(self) -> Critic | None:
        """What chooses among candidates: read before the first request for some, which it could fail."""
        if self._load_critic is None or self.limits.max_candidates == 1:
            return None
        critic = self._load_critic()
        return None if critic is None else critic.to(self.pipe.model.device)

    def _after_crash(self, error: Exception, crashes: int) -> None:
        """One error for each row in progress; queued rows are kept for the next engine, unless it is the last crash."""
        self.metrics.restarts.inc()
        with self._changed:
            rows, self._running = self._running + self._scheduler.clear(), []
            last = crashes >= MAX_CRASHES
            if self.state != "stopped":
                self.state = "failed" if last else "draining" if self.state == "draining" else "starting"
        reason = type(error).__name__
        for row in rows:
            self._fail(row, EngineError(503, "engine_failed", f"the engine failed ({reason}) and restarts", 5))
        if last:
            self._give_up(EngineError(503, "engine_failed", f"the engine failed ({reason}) and does not come back"))
            return
        time.sleep(BACKOFF * 2 ** (crashes - 1))
        try:
            self.pipe = self._load()
            self.critic = self._critic()
        except Exception:
            log.exception("the model could not be loaded again; the old one is tried")

    def _work(self, computer: Computer) -> bool:
        """One batch, one stage; False when stopped."""
        work = self._next()
        if work is None:
            return False
        start = time.monotonic()
        try:
            chunk = computer.begin(work) if isinstance(work, list) else work
            left = None if chunk is None else computer.advance(chunk)
        except torch.OutOfMemoryError:
            self._shrink()
            return True
        finished = len(self._running) if left is None else 0
        if finished:
            took = (time.monotonic() - start) * len(computer.pipe.model.plan) / finished
            self._seconds_per_image += 0.2 * (took - self._seconds_per_image)
        with self._changed:
            self._running = []
            if left is not None:
                self._scheduler.put_back(left)
        return True

    def _next(self) -> list[Row] | Chunk | None:
        """Wait for work; rows that expired or were cancelled go first."""
        with self._changed:
            while not self._stop:
                self._sweep()
                if not (self._scheduler.new or self._scheduler.chunks):
                    self._changed.wait()
                    self._gather()
                    continue
                work = self._scheduler.next()
                assert work is not None
                self._running = work if isinstance(work, list) else work.members
                self.metrics.queue_depth.set(len(self._scheduler.new))
                self.metrics.in_progress.set(len(self._running) + len(self._scheduler.in_progress()))
                return work
            return None

    def _gather(self) -> None:
        """After idling: requests tend to come together, and one batch for all is cheaper than one for the first. The
        wait ends early when a quarter of it brought nobody."""
        quiet = self.limits.gather_ms / 4000
        until = time.monotonic() + self.limits.gather_ms / 1000
        while not self._stop and len(self._scheduler.new) < self.limits.max_batch and time.monotonic() < until:
            if not self._changed.wait(quiet):
                return

    def _sweep(self, *, begun: bool = True) -> None:
        now = time.monotonic()
        for row in self._scheduler.remove(lambda row: row.cancelled or row.deadline < now, begun=begun):
            if row.cancelled:
                self.metrics.dropped.labels("cancelled").inc()
            else:
                message = f"not finished within {self.limits.deadline:g} seconds"
                self._fail(row, EngineError(504, "deadline_exceeded", message, 5))
        if not (self._scheduler.new or self._scheduler.chunks):
            self.metrics.queue_depth.set(0)
            self.metrics.in_progress.set(0)

    def _shrink(self) -> None:
        """Out of memory: the batch is lost, later ones are half as large."""
        with self._changed:
            rows, self._running = self._running, []
            self._scheduler.max_batch = max(1, min(self._scheduler.max_batch, len(rows)) // 2)
        log.error("out of memory with %d images; batches are now at most %d", len(rows), self._scheduler.max_batch)
        torch.cuda.empty_cache()
        for row in rows:
            self._fail(row, EngineError(503, "out_of_memory", "the device ran out of memory; try again", 5))

    def _give_up(self, error: EngineError) -> None:
        with self._changed:
            rows = self._running + self._scheduler.remove(lambda _: True)
            self._running = []
            for row in rows:
                row.cancelled = True  # one may be in a batch that is being computed: it goes no further
        for row in rows:
            self._fail(row, error)

    def _fail(self, row: Row, error: EngineError) -> None:
        self.metrics.dropped.labels(error.code).inc()
        row.emit(Failed(error))
