"""The loop over steps, of whatever task: resume, update, log, save, stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.processes.signals import Stopped, StopRequest
from ecar.processes.watchdog import BACKWARD, FORWARD, READ, SAVE, UPDATE, WAIT, Watchdog
from ecar.processes.world import World
from ecar.training.engine.checkpoint import (
    find_checkpoint,
    read_record,
    read_tensors,
    restore_training,
    training_tensors,
)
from ecar.training.engine.ema import EMA
from ecar.training.engine.log import RunLog, by_the_way, run_record
from ecar.training.engine.options import RunOptions, ScaleOptions
from ecar.training.engine.parallel import gathered, no_sync, parallel, shard, whole
from ecar.training.engine.resume import check_max_steps
from ecar.training.engine.saving import Saver
from ecar.training.engine.task import Losses, Task, Watch

MAX_BAD_STEPS = 5
GRADIENT_NORM = 1.0  # at most, of an update
_ALONE, _WHOLE = World(), ScaleOptions()


class NonFiniteLossError(RuntimeError):
    """Training diverged; the checkpoints on disk are untouched."""


class Trainer:
    """State of a run: task, average, optimizers, counters.

    Args:
        task: what is learned.
        run: options; ``device`` as resolved.
        out: folder of the run.
        ema: decays of the averages.
        scale: how a step is computed.
        world: this process among those of the run.
        stop: says when to stop early.
        watch: looks at the averaged weights now and then.
        pictures: whether checkpoints come with a picture.
    """

    def __init__(
        self,
        task: Task,
        run: RunOptions,
        out: Path,
        *,
        ema: tuple[float, ...],
        scale: ScaleOptions = _WHOLE,
        world: World = _ALONE,
        stop: StopRequest | None = None,
        watch: Watch | None = None,
        pictures: bool = True,
    ) -> None:
        self.task, self.options, self.out, self.scale = task, run, out, scale
        self.world, self.stop = world, stop or StopRequest()
        self.watch, self.pictures, self.watchdog = watch, pictures, Watchdog(world)
        self.losses, units, self.unused = task.wrapped()
        self.sharded = scale.parallel == "fsdp" and world.size > 1
        if self.sharded:  # before anything holds on to parameters
            shard(self.losses, units, run.device, world.size)
        self.ema = EMA(task.module, ema)
        self.optimizers, others = task.optimizers()
        self.saved_optimizers = self.optimizers + others
        self.step = self.skipped = self.seen = 0
        self.turned = False
        folder = world.from_first(lambda: find_checkpoint(out))
        if folder is not None:
            self._restore(folder)
        task.ready()

    def _restore(self, folder: Path) -> None:
        record = read_record(folder)
        self.task.check(record)
        self.step, self.skipped, self.seen = (int(record[key]) for key in ("step", "skipped", "seen"))
        check_max_steps(self.options.max_steps, self.step, self.out)
        tensors = read_tensors(folder)
        restore_training(tensors, self.task.module, self.ema, self.saved_optimizers)
        self.task.restore(tensors, int(record["ema_updates"]))
        self.ema.updates = int(record["ema_updates"])

    def run(self) -> None:
        """From the step that the checkpoint left to ``max_steps``."""
        self.stop.begun = True
        with ExitStack() as stack:
            log = stack.enter_context(self._open_log()) if self.world.rank == 0 else None
            stack.enter_context(self.watchdog)
            stack.enter_context(self.task)
            if not self.sharded:
                stack.enter_context(self._parallel())
            self._look_back(log)
            self._steps(log, Saver(self.out, self.world, log, saved=self.step))

    @contextmanager
    def _parallel(self) -> Iterator[None]:
        """DDP around the losses while the steps are taken. It has to go before its process group does: the last one
        who lets go of a gloo group joins its threads, DDP with Python's lock held, for which such a thread may wait."""
        losses = self.losses
        self.losses = parallel(losses, self.world, unused=self.unused)
        try:
            yield
        finally:
            self.losses = losses

    def _open_log(self) -> RunLog:
        """The log and its first lines: what this run is, where it started from."""
        line = self.task.begin(self.step == 0)
        about, world = self.task.about(), self.world.size
        record = run_record(self.options, about, world, self.task.rows, self.scale.accumulate)
        log = RunLog(self.out, step=self.step, record=record)
        log.begin(self.seen)
        if line:
            log.write(step=self.step, **line)
        return log

    def _steps(self, log: RunLog | None, saver: Saver) -> None:
        run, first = self.options, log is not None
        sums, steps, bad, start = torch.zeros(len(self.task.names)), 0, 0, time.perf_counter()
        bar = tqdm(total=run.max_steps, initial=self.step, desc="training", disable=None if first else True)
        while self.step < run.max_steps and not self.turned:
            self.step, self.seen = self.step + 1, self.seen + run.batch_size
            means = self.train_step()
            bar.update()
            if means is None:
                bad, self.skipped = bad + 1, self.skipped + 1
                if bad >= MAX_BAD_STEPS:
                    raise self._diverged(bad)
            else:
                bad, sums, steps = 0, sums + means, steps + 1
            if (self.step % run.log_every == 0 or self.step == run.max_steps) and steps and log is not None:
                seconds = log.seconds_before + time.perf_counter() - start
                self._log(log, bar, (sums / steps).tolist(), round(seconds, 2))
                sums, steps = torch.zeros_like(sums), 0
            self.watchdog.at(self.step, SAVE)
            self._at_intervals(saver, log)
            self.watchdog.at(self.step, WAIT)
            if code := self.world.largest(self.stop.code):  # every rank stops after the same step
                bar.close()
                self._leave(saver, code)
        bar.close()

    def _log(self, log: RunLog, bar: tqdm[None], means: list[float], seconds: float) -> None:
        line = self.task.line(means)
        log.write(
            step=self.step,
            **line,
            lr=self.task.rate(self.step),
            images=self.seen,
            seconds=seconds,
            skipped=self.skipped,
        )
        bar.set_postfix(loss=f"{line['loss']:.4f}")
        if bar.disable:  # no terminal: one plain line instead of the bar
            print(f"step {self.step} of {self.options.max_steps}: loss {line['loss']:.4f}", flush=True)

    def _leave(self, saver: Saver, code: int) -> None:
        if self.world.largest(int(saver.saved != self.step)):
            self._save(saver, last=True)
        self.world.barrier()
        raise Stopped(self.step, code)

    def _diverged(self, bad: int) -> NonFiniteLossError:
        if self.world.rank == 0:
            rows = self.task.rows_of(range(self.step - bad + 1, self.step + 1))
            (self.out / "non_finite.json").write_text(json.dumps(rows) + "\n")
        return NonFiniteLossError(
            f"{bad} steps in a row without a finite loss (the last: {self.step}; non_finite.json lists their rows); "
            f"run the command again with a lower --lr or --dtype fp32: it resumes from the last checkpoint"
        )

    def train_step(self) -> Tensor | None:
        """One update; the mean losses, or None where the loss or gradient was not finite (no update)."""
        self.watchdog.at(self.step, READ)
        batch = self.task.draw(self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts, found = self.world.parts(self.scale.accumulate), list[Losses]()
        for part in parts:
            with no_sync(self.losses, last=part is parts[-1]):
                self.watchdog.at(self.step, FORWARD)
                losses = self.task.losses(self.losses, batch, part)
                self.watchdog.at(self.step, BACKWARD)
                (losses.total / len(parts)).backward()
            found.append(losses)
        self.watchdog.at(self.step, UPDATE)
        means = torch.stack([losses.means / len(parts) for losses in found]).sum(0)
        norm = torch.nn.utils.clip_grad_norm_(self.task.module.parameters(), GRADIENT_NORM, foreach=True)
        # One wait for the device. The same numbers, so the same answer, on every rank.
        *values, total = torch.cat([self.world.mean(means), whole(norm).float().view(1)]).tolist()
        if not math.isfinite(sum(values) + total):
            return None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.task.rate(self.step)
            optimizer.step()
        self.ema.update(self.task.module)
        return torch.tensor(values + self.task.updated(self.ema.updates, [losses.rest for losses in found]))

    def averaged(self, decay: float | None = None) -> dict[str, Tensor]:
        """Averaged weights (of the first decay, or another one), whole; every rank has to ask for them."""
        average = self.ema.weights if decay is None else self.ema.averages[decay]
        return {name: whole(tensor) for name, tensor in average.items()}

    def _at_intervals(self, saver: Saver, log: RunLog | None) -> None:
        run, last = self.options, self.step == self.options.max_steps
        if self.watch is not None and (self.step % self.watch.every == 0 or last):
            weights = self.averaged()
            if log is not None:
                log.write(step=self.step, **self.watch(weights))
            self._look_back(log)
            last = last or self.turned
        if self.step % run.save_every and not last:
            return
        self._save(saver, last=last)
        if self.pictures and self.step >= run.save_every:  # after the checkpoint: they may fail; a short run has none
            weights = self.averaged()
            if log is not None:
                with by_the_way("a grid of samples"):
                    log.image("samples", self.task.picture(weights, self.step), self.step)

    def _look_back(self, log: RunLog | None) -> None:
        """Whether to end by what the watch says; all ranks agree."""
        turned = self.watch is not None and log is not None and self.watch.turned
        self.turned = bool(self.world.largest(int(turned)))

    def _save(self, saver: Saver, *, last: bool) -> None:
        if self.world.rank == 0:
            self.task.saving(self.step)
        counts = {"skipped": self.skipped, "seen": self.seen, "ema_updates": self.ema.updates}
        record = json.loads(json.dumps({**counts, **self.task.record()}))
        tensors = training_tensors(self.task.module, self.ema, self.saved_optimizers) | self.task.tensors()
        if self.sharded:
            tensors = gathered(tensors, self.world.rank)
        saver.save(self.step, tensors, record, last=last or bool(self.stop.code))
