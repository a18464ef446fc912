"""The trainer: one process, resumable, latents in memory."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.data.latents import LatentTable
from ecar.devices import mixed_precision, resolve_device
from ecar.files.lock import run_lock
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.tokenizers import Tokenizer
from ecar.training.build import build_config, check_model, load_table, rows_per_stage, with_data
from ecar.training.config import TrainConfig
from ecar.training.curves import LossCurves
from ecar.training.distill import Teacher
from ecar.training.draws import BatchesAhead
from ecar.training.engine.about import run_record
from ecar.training.engine.checkpoint import (
    find_checkpoint,
    read_record,
    read_tensors,
    restore_training,
    training_tensors,
)
from ecar.training.engine.distributed import Part, World, check_divides, no_sync, parallel
from ecar.training.engine.ema import EMA
from ecar.training.engine.log import RunLog, by_the_way
from ecar.training.engine.memory import checkpoint_activations, memory_advice
from ecar.training.engine.optim import learning_rate, make_optimizers
from ecar.training.engine.pace import Pace
from ecar.training.engine.saving import Saver
from ecar.training.engine.sharded import restore_sharded
from ecar.training.engine.sharding import shard, whole
from ecar.training.engine.signals import Stopped, StopRequest
from ecar.training.engine.watchdog import BACKWARD, FORWARD, READ, SAVE, UPDATE, WAIT, Watchdog
from ecar.training.finetune import Source
from ecar.training.loss import Draws, StageLoss
from ecar.training.own_samples import keep_own_samples
from ecar.training.run import (
    check_max_steps,
    check_out,
    check_same_data,
    keep_options,
    make_out,
    save_batches,
    save_final,
    save_samples,
)

MAX_BAD_STEPS = 5
_ALONE = World()


class NonFiniteLossError(RuntimeError):
    """Training diverged; the checkpoints on disk are untouched."""


def train(config: TrainConfig) -> Path:
    """Train, or resume the run in ``config.out``; returns the folder of the final model.

    Raises:
        ValueError: bad options or data, or a run folder that holds a run with other options.
        NonFiniteLossError: ``MAX_BAD_STEPS`` steps in a row without a finite loss.
        Stopped: a signal came; the checkpoint is written.
        OSError: several saves in a row failed, or the last one.
    """
    out, device = make_out(config.out, config.data), resolve_device(config.device)
    world = World.start(device, config.stall_timeout)
    config = dataclasses.replace(config, device=world.local_device(device))
    with run_lock(out) if world.rank == 0 else nullcontext(), StopRequest() as stop:
        source = Source.find(config, out)
        config = source.with_defaults(config) if source else config
        changed = check_out(config, out) if world.rank == 0 else ""
        check_divides(config.batch_size, rows_per_stage(config), world.size, config.accumulate)
        world.barrier()
        if source is not None and config.own_samples:
            assert source.tokenizer is not None
            check_model(config, source.tokenizer, source)
            world.from_first(lambda: keep_own_samples(config, source))
        table, tokenizer = load_table(config, source)
        torch.manual_seed(config.seed)
        wanted = with_data(build_config(config, tokenizer), table)
        model = source.build(config, wanted) if source else build_model(wanted)
        teacher = None
        if config.distill and source is not None:
            teacher = Teacher.load(config, source.fingerprint, source.config, model.config)
            model.config = model.config.replace(sampling=teacher.sampling())
        if config.parallel == "ddp" or world.size == 1:  # slices go to the device block by block
            model = model.to(config.device)
        trainer = Trainer(config, model, table, tokenizer, out, world, stop, source, changed, teacher)
        if changed:
            keep_options(config, out)
        try:
            with memory_advice(config.accumulate):
                trainer.run()
        except Stopped:  # by all ranks, after the same step
            world.stop()
            raise
        for decay in config.ema:
            final = trainer.averaged(decay)
            if final is not None:
                save_final(final, tokenizer, config, out, decay, source)
        if source is not None and world.rank == 0:
            source.save_adapter(out, model.config, trainer.ema.weights)
    world.stop()
    return out / "final"


class Trainer:
    """State of a run: model, average, optimizers, logs.

    Args:
        config: options.
        model: on its device.
        table: latents in memory.
        tokenizer: decodes the sample grids.
        out: folder of the run.
        world: this process among those of the run.
        stop: says when to stop early.
        source: the model that the run starts from, already in ``model``.
        changed: what is other than in the run that is resumed, in words.
        teacher: whose velocities are learned, where it is not the data's.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: StageModel,
        table: LatentTable,
        tokenizer: Tokenizer,
        out: Path,
        world: World = _ALONE,
        stop: StopRequest | None = None,
        source: Source | None = None,
        changed: str = "",
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.model, self.table, self.tokenizer, self.out = config, model, table, tokenizer, out
        self.source, self.changed = source, [changed] if changed else []
        self.world, self.stop = world, stop or StopRequest()
        self.watchdog = Watchdog(world, config.stall_timeout)
        self.losses: torch.nn.Module = StageLoss(model, teacher)
        self.sharded = config.parallel == "fsdp" and world.size > 1
        if self.sharded:  # before anything holds on to parameters
            shard(self.losses, model.units, config.device, world.size)
        self.ema = EMA(model, config.ema)
        self.optimizers = make_optimizers(model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay)
        self.rows = rows_per_stage(config)
        self.curves = LossCurves(len(model.plan), config.device)
        ahead = config.device.startswith("cuda")
        self.batches = BatchesAhead(config, table, model.plan, model.config.null_class, ahead=ahead)
        self.step = self.skipped = self.seen = 0
        folder = world.from_first(lambda: find_checkpoint(out))
        if folder is not None:
            self._restore(folder)
        if config.activation_checkpointing:
            checkpoint_activations(model.blocks)
        if config.compile:
            model.compile_blocks()

    def _restore(self, folder: Path) -> None:
        record = read_record(folder)
        other = check_same_data(record, self.model.config, self.table, self.config.allow_change)
        self.changed += [other] if other else []
        if self.sharded:
            restore_sharded(folder, self.model, self.ema, self.optimizers)
        else:
            restore_training(read_tensors(folder), self.model, self.ema, self.optimizers)
        self.step, self.skipped = int(record["step"]), int(record["skipped"])
        self.seen = int(record["seen"])
        check_max_steps(self.config.max_steps, self.step, self.out)
        self.ema.updates = int(record["ema_updates"])

    def run(self) -> None:
        """From the step that the checkpoint left to ``max_steps``."""
        how = {"sharded": self.sharded, "background": self.config.async_save}
        self.stop.begun = True
        with ExitStack() as stack:
            log = stack.enter_context(self._open_log()) if self.world.rank == 0 else None
            stack.enter_context(self.watchdog)
            saver = stack.enter_context(Saver(self.out, self.world, log, **how, saved=self.step))
            stack.enter_context(self.batches)
            if not self.sharded:
                stack.enter_context(self._parallel())
            self._steps(log, saver)

    @contextmanager
    def _parallel(self) -> Iterator[None]:
        """DDP around the losses while the steps are taken. It has to go before its process group does: the last one
        who lets go of a gloo group joins its threads, DDP with Python's lock held, for which such a thread may wait."""
        losses = self.losses
        self.losses = parallel(losses, self.world, stages=len(self.model.plan))
        try:
            yield
        finally:
            self.losses = losses

    def _open_log(self) -> RunLog:
        """The log and its first lines: what this run is, where it started from, what changed since."""
        images, parameters, source = len(self.table), self.model.num_parameters(), self.source
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if self.step == 0:
            if source is not None:
                source.keep(self.config, self.out)
                source.announce()
            frozen = "" if trained == parameters else f", {trained:,} of them trained"
            print(f"{parameters:,} parameters{frozen}, {images:,} images, rows {self.rows}")
        counts = {"images": images, "skipped": len(self.table.skipped), "parameters": parameters}
        record = run_record(self.config, world=self.world.size, rows=self.rows, data=self.table.about, **counts)
        log = RunLog(self.out, step=self.step, trackers=self.config.trackers, record=record)
        log.begin(self.seen)
        if self.step == 0 and source is not None:
            log.write(step=0, init_from=source.record(), trained_parameters=trained)
        if self.changed:
            print(f"resumed with changes: {'; '.join(self.changed)}", file=sys.stderr)
            log.write(step=self.step, changed="; ".join(self.changed))
        return log

    def _steps(self, log: RunLog | None, saver: Saver) -> None:
        config, first, pace = self.config, log is not None, Pace(self.config.device, log)
        sums, steps, bad, start = torch.zeros(len(self.model.plan)), 0, 0, time.perf_counter()
        bar = tqdm(total=config.max_steps, initial=self.step, desc="training", disable=None if first else True)
        while self.step < config.max_steps:
            self.step, self.seen = self.step + 1, self.seen + config.batch_size
            with pace.step(self.step):
                means = self.train_step()
            bar.update()
            if means is None:
                bad, self.skipped = bad + 1, self.skipped + 1
                if bad >= MAX_BAD_STEPS:
                    raise self._diverged(bad)
            else:
                bad, sums, steps = 0, sums + means, steps + 1
            if (self.step % config.log_every == 0 or self.step == config.max_steps) and steps and log is not None:
                stage = {f"loss_{k + 1}": round(v, 5) for k, v in enumerate((sums / steps).tolist())}
                total = sum(w * v for w, v in zip(config.stage_weight, stage.values(), strict=True))
                log.write(
                    step=self.step,
                    loss=round(total, 5),
                    **stage,
                    lr=self._rate(),
                    images=self.seen,
                    seconds=round(log.seconds_before + time.perf_counter() - start, 2),
                    skipped=self.skipped,
                )
                bar.set_postfix(loss=f"{total:.4f}")
                if bar.disable:  # no terminal: one plain line instead of the bar
                    print(f"step {self.step} of {config.max_steps}: loss {total:.4f}", flush=True)
                sums, steps = torch.zeros_like(sums), 0
            self.watchdog.at(self.step, SAVE)
            saver.settle()
            self._at_intervals(saver, log)
            self.watchdog.at(self.step, WAIT)
            if code := self.world.largest(self.stop.code):  # every rank stops after the same step
                bar.close()
                saver.settle(wait=True)
                if self.world.largest(int(saver.saved != self.step)):
                    self._save(saver, last=True)
                self.world.barrier()
                raise Stopped(self.step, code)
        bar.close()

    def _rate(self) -> float:
        c = self.config
        return learning_rate(self.step, peak=c.lr, steps=c.max_steps, warmup=c.warmup, decay=c.decay)

    def _diverged(self, bad: int) -> NonFiniteLossError:
        if self.world.rank == 0:
            save_batches(self.out, self.config, len(self.table), range(self.step - bad + 1, self.step + 1))
        return NonFiniteLossError(
            f"{bad} steps in a row without a finite loss (the last: {self.step}; non_finite.json lists their rows); "
            f"run the command again with a lower --lr or --dtype fp32: it resumes from the last checkpoint"
        )

    def train_step(self) -> Tensor | None:
        """One update; per-stage mean losses (S,), or None where the loss or gradient was not finite (no update)."""
        config = self.config
        self.watchdog.at(self.step, READ)
        batch = self.batches(self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        means = torch.zeros(len(self.rows), device=config.device)
        parts, curves = self.world.parts(config.accumulate), []
        for part in parts:
            with no_sync(self.losses, last=part is parts[-1]):
                times, losses = self._backward(part, *batch)
            means += torch.stack([loss.detach().mean() for loss in losses]) / len(parts)
            curves.append((times, losses))
        self.watchdog.at(self.step, UPDATE)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip, foreach=True)
        # One wait for the device. The same numbers, so the same answer, on every rank.
        *values, total = torch.cat([self.world.mean(means), whole(norm).float().view(1)]).tolist()
        if not math.isfinite(sum(values) + total):
            return None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate()
            optimizer.step()
        self.ema.update(self.model)
        for times, losses in curves:
            for k, loss in enumerate(losses):
                self.curves.add(k, times[k, : len(loss)], loss)
        return torch.tensor(values)

    def _backward(self, part: Part, z: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, list[Tensor]]:
        """Add the gradient of a micro-batch; returns its times (S, b) and losses (rows of the stage,)."""
        config, draws = self.config, draws.select(part.where)
        self.watchdog.at(self.step, FORWARD)
        rows = tuple(r // part.count for r in self.rows)
        with mixed_precision(config.device, wanted=config.dtype == "bf16"):
            losses = self.losses(part.rows(z), part.rows(labels), draws, rows)
        self.watchdog.at(self.step, BACKWARD)
        means = torch.stack([loss.mean() for loss in losses])
        weights = torch.tensor(config.stage_weight, device=means.device)
        ((weights * means).sum() / config.accumulate).backward()
        return draws.times, [loss.detach() for loss in losses]

    def averaged(self, decay: float | None = None) -> StageModel | None:
        """On rank 0 a copy of the model with averaged weights (of the first decay, or another one), in evaluation mode;
        every rank has to ask for it: slices are gathered."""
        average = self.ema.averages[self.config.ema[0] if decay is None else decay]
        weights = {name: whole(tensor) for name, tensor in average.items()}
        if self.world.rank != 0:
            return None
        if self.source is not None:
            return self.source.averaged(self.model, weights).to(self.config.device).eval()
        model = build_model(self.model.config)
        model.load_state_dict({**self.model.state_dict(), **weights})
        return model.to(self.config.device).eval()

    def _at_intervals(self, saver: Saver, log: RunLog | None) -> None:
        config, last = self.config, self.step == self.config.max_steps
        if self.step % config.save_every == 0 or last:
            self._save(saver, last=last)
        if config.sample_every and (self.step % config.sample_every == 0 or last):  # after the checkpoint: it may fail
            model = self.averaged()
            if model is not None and log is not None:
                with by_the_way("a grid of samples"):
                    log.image("samples", save_samples(model, self.tokenizer, self.out, self.step), self.step)

    def _save(self, saver: Saver, *, last: bool) -> None:
        if self.world.rank == 0:
            with by_the_way("loss_vs_t"):
                self.curves.save(self.out, self.step)
        record = {
            "skipped": self.skipped,
            "seen": self.seen,
            "ema_updates": self.ema.updates,
            "train": dataclasses.asdict(self.config),
            "model": self.model.config.to_json(),
            "images": len(self.table),
            "content": self.table.content,
        }
        tensors = training_tensors(self.model, self.ema, self.optimizers)
        saver.save(self.step, tensors, json.loads(json.dumps(record)), last=last or bool(self.stop.code))
