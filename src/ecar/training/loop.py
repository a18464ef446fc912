"""The trainer: one process, resumable, latents in memory."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.config import ModelConfig, SamplingConfig, StageConfig
from ecar.data.latents import LatentTable, encode_source, is_cache, load_latents
from ecar.data.source import load_source
from ecar.devices import resolve_device
from ecar.model import StageModel, build_model
from ecar.presets import default_steps, get_preset
from ecar.stages import make_plan, pyramid, velocity_std
from ecar.tokenizers import Tokenizer, load_tokenizer
from ecar.training.about import run_record
from ecar.training.checkpoint import load_checkpoint, restore_training, save_checkpoint, training_tensors
from ecar.training.config import TrainConfig
from ecar.training.curves import LossCurves
from ecar.training.distributed import World, check_divides, parallel
from ecar.training.draws import draw_batch
from ecar.training.ema import EMA
from ecar.training.lock import run_lock
from ecar.training.log import RunLog
from ecar.training.loss import StageLoss
from ecar.training.optim import learning_rate, make_optimizers
from ecar.training.run import check_out, check_same_data, make_out, save_batches, save_final, save_samples
from ecar.training.signals import Stopped, StopRequest

MAX_BAD_STEPS = 5
MAX_FAILED_SAVES = 3
_ALONE = World()
_STATISTICS_IMAGES = 5000


class NonFiniteLossError(RuntimeError):
    """Training diverged; the checkpoints on disk are untouched."""


def train(config: TrainConfig) -> Path:
    """Train, or resume the run in ``config.out``; returns the folder of the final model.

    Raises:
        ValueError: bad options or data, or a run folder that holds a run with other options.
        NonFiniteLossError: ``MAX_BAD_STEPS`` steps in a row without a finite loss.
        Stopped: a signal came; the checkpoint is written.
        OSError: ``MAX_FAILED_SAVES`` saves in a row failed, or the last one.
    """
    out, device = make_out(config.out), resolve_device(config.device)
    world = World.start(device)
    config = dataclasses.replace(config, device=world.local_device(device))
    with run_lock(out) if world.rank == 0 else nullcontext(), StopRequest() as stop:
        if world.rank == 0:
            check_out(config, out)
        world.barrier()
        table, tokenizer = load_table(config)
        torch.manual_seed(config.seed)
        model = build_model(with_data(build_config(config, tokenizer), table)).to(config.device)
        trainer = Trainer(config, model, table, tokenizer, out, world, stop)
        trainer.run()
        if world.rank == 0:
            save_final(trainer.averaged(), tokenizer, config, out)
    world.stop()
    return out / "final"


def load_table(config: TrainConfig) -> tuple[LatentTable, Tokenizer]:
    """The latents to train on: a cache as it is, or images encoded now, after every option has been checked."""
    if is_cache(config.data):
        table, tokenizer = load_latents(config.data)
        build_config(config, tokenizer)
        if config.tokenizer is not None and load_tokenizer(config.tokenizer).fingerprint() != table.tokenizer:
            raise ValueError(
                f"--data {config.data} holds latents of another tokenizer than --tokenizer; "
                "leave --tokenizer out: the cache has its own"
            )
        if table.image_side != config.image_side:
            raise ValueError(f"--data {config.data} holds images of {table.image_side}, not {config.image_side}")
        if config.flip and table.latents.shape[0] == 1:
            raise ValueError(f"--data {config.data} holds no mirrored images; encode with --flip")
        rows = slice(None, config.max_images)
        latents = table.latents[: 2 if config.flip else 1, rows]
        return dataclasses.replace(table, latents=latents, labels=table.labels[rows]), tokenizer
    tokenizer = load_tokenizer(config.tokenizer or "pixels")
    build_config(config, tokenizer)
    source = load_source(config.data, max_images=config.max_images)
    return encode_source(source, tokenizer, config.image_side, flip=config.flip, device=config.device), tokenizer


def build_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model that the options and the tokenizer ask for, without what only the data can tell.

    Raises:
        ValueError: sides that do not divide, an unknown preset, sizes that do not fit each other.
    """
    side, preset = tokenizer.latent_side(*config.image_side), get_preset(config.preset)
    stages, dit = config.num_stages, config.model == "dit"
    trunk = 0 if dit else preset.trunk_depth
    return ModelConfig(
        kind=config.model,
        stages=StageConfig.for_latent(side, stages, ends=config.ends, rho=config.rho),
        channels=tokenizer.channels,
        width=preset.width if config.width is None else config.width,
        heads=preset.heads if config.heads is None else config.heads,
        trunk_depth=trunk if config.trunk_depth is None else config.trunk_depth,
        head_depth=preset.depth - trunk if config.head_depth is None else config.head_depth,
        prediction=config.prediction,
        context_noise=0.0 if dit else config.context_noise,
        image_side=config.image_side,
        sampling=SamplingConfig(
            steps=(25,) if stages == 1 else default_steps(stages), guidance=(1.0,) * stages, solver="ab2"
        ),
    )


def with_data(model: ModelConfig, table: LatentTable) -> ModelConfig:
    """``model`` with the classes, the tokenizer and the velocity scales of the data."""
    plan = make_plan(model.stages)
    every = max(1, len(table) // _STATISTICS_IMAGES)  # spread out: folders are sorted by class
    maps = pyramid(table.latents[0, ::every].float(), len(plan))
    return model.replace(
        num_classes=len(table.class_names),
        class_names=table.class_names,
        velocity_std=tuple(round(velocity_std(s, z), 6) for s, z in zip(plan, maps, strict=True)),
        tokenizer=table.tokenizer,
    )


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
    ) -> None:
        self.config, self.model, self.table, self.tokenizer, self.out = config, model, table, tokenizer, out
        self.world, self.stop, self.failed_saves, self.saved = world, stop or StopRequest(), 0, 0
        self.ema, self.optimizers = EMA(model, config.ema), make_optimizers(model, config)
        self.rows = tuple(max(1, round(share * config.batch_size)) for share in config.stage_share)
        check_divides(config.batch_size, self.rows, world.size)
        self.curves = LossCurves(len(model.plan))
        self.step = self.skipped = 0
        found = load_checkpoint(out)
        if found is not None:
            check_same_data(found[1], model.config, len(table))
            restore_training(found[0], model, self.ema, self.optimizers)
            self.step, self.skipped = int(found[1]["step"]), int(found[1]["skipped"])
            self.saved = self.step
            self.ema.updates = int(found[1]["ema_updates"])
        if config.compile:
            model.compile_blocks()
        self.losses = parallel(StageLoss(model), world, stages=len(model.plan))

    def run(self) -> None:
        """From the step that the checkpoint left to ``max_steps``."""
        if self.world.rank:
            return self._steps(None)
        images, parameters = len(self.table), self.model.num_parameters()
        if self.step == 0:
            print(f"{parameters:,} parameters, {images:,} images, rows {self.rows}")
        record = run_record(self.config, images=images, parameters=parameters, world=self.world.size, rows=self.rows)
        with RunLog(self.out, step=self.step, trackers=self.config.trackers, record=record) as log:
            log.begin(self.step * self.config.batch_size)
            self._steps(log)

    def _steps(self, log: RunLog | None) -> None:
        config, first = self.config, log is not None
        sums, steps, bad, start = torch.zeros(len(self.model.plan)), 0, 0, time.perf_counter()
        bar = tqdm(total=config.max_steps, initial=self.step, desc="training", disable=None if first else True)
        while self.step < config.max_steps:
            self.step += 1
            means = self.train_step()
            bar.update()
            if means is None:
                bad, self.skipped = bad + 1, self.skipped + 1
                if bad >= MAX_BAD_STEPS:
                    if first:
                        save_batches(self.out, config, len(self.table), range(self.step - bad + 1, self.step + 1))
                    raise NonFiniteLossError(
                        f"{bad} steps in a row without a finite loss (the last: {self.step}; non_finite.json lists "
                        f"their images); run the command again with a lower --lr or --dtype fp32: it resumes from the "
                        f"last checkpoint"
                    )
            else:
                bad, sums, steps = 0, sums + means, steps + 1
            if self.step % config.log_every == 0 and steps and log is not None:
                stage = {f"loss_{k + 1}": round(v, 5) for k, v in enumerate((sums / steps).tolist())}
                total = sum(w * v for w, v in zip(config.stage_weight, stage.values(), strict=True))
                log.write(
                    step=self.step,
                    loss=round(total, 5),
                    **stage,
                    lr=learning_rate(self.step, config),
                    images=self.step * config.batch_size,
                    seconds=round(log.seconds_before + time.perf_counter() - start, 2),
                    skipped=self.skipped,
                )
                bar.set_postfix(loss=f"{total:.4f}")
                if bar.disable:  # no terminal: one plain line instead of the bar
                    print(f"step {self.step} of {config.max_steps}: loss {total:.4f}", flush=True)
                sums, steps = torch.zeros_like(sums), 0
            if log is not None:
                self._at_intervals(log)
            if code := self.world.largest(self.stop.code):  # every rank stops after the same step
                bar.close()
                if log is not None and self.saved != self.step:
                    self._save(log)
                self.world.barrier()
                raise Stopped(self.step, code)
        bar.close()

    def train_step(self) -> Tensor | None:
        """One update; per-stage mean losses (S,), or None where the loss or gradient was not finite (no update)."""
        config = self.config
        z, labels, draws = draw_batch(config, self.table, self.model.plan, self.model.config.null_class, self.step)
        z, labels, draws = self.world.rows(z), self.world.rows(labels), self.world.draws(draws)
        rows, autocast = tuple(r // self.world.size for r in self.rows), config.dtype == "bf16"
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=autocast):
            losses = self.losses(z, labels, draws, rows)
        means = torch.stack([loss.mean() for loss in losses])
        weights = torch.tensor(config.stage_weight, device=means.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        (weights * means).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip, foreach=True)
        means = self.world.mean(means.detach())
        if not math.isfinite(float(norm) + float(means.sum())):  # the same numbers, so the same answer, on every rank
            return None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config)
            optimizer.step()
        self.ema.update(self.model)
        for k, loss in enumerate(losses):
            self.curves.add(k, draws.times[k, : rows[k]], loss)
        return means.cpu()

    def averaged(self) -> StageModel:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = build_model(self.model.config).to(self.config.device)
        self.ema.copy_to(model)
        return model.eval()

    def _at_intervals(self, log: RunLog) -> None:
        config, last = self.config, self.step == self.config.max_steps
        if self.step % config.save_every == 0 or last:
            self._save(log)
        if config.sample_every and (self.step % config.sample_every == 0 or last):  # after the checkpoint: it may fail
            path = save_samples(self.averaged(), self.tokenizer, self.out, self.step)
            log.image("samples", path, self.step)

    def _save(self, log: RunLog) -> None:
        """A checkpoint. A disk that is full now may have room at the next one: only several failures in a row end the
        run, and a failure at its end."""
        self.curves.save(self.out, self.step)
        record = {
            "skipped": self.skipped,
            "ema_updates": self.ema.updates,
            "train": dataclasses.asdict(self.config),
            "model": self.model.config.to_json(),
            "images": len(self.table),
        }
        tensors = training_tensors(self.model, self.ema, self.optimizers)
        try:
            save_checkpoint(self.out, self.step, tensors, json.loads(json.dumps(record)))
        except OSError as error:
            self.failed_saves += 1
            last = self.step == self.config.max_steps or self.stop.code
            if last or self.failed_saves >= MAX_FAILED_SAVES:
                raise
            print(f"WARNING: step {self.step}: no checkpoint ({error}); training goes on", file=sys.stderr, flush=True)
            log.write(step=self.step, failed_save=str(error))
        else:
            self.failed_saves, self.saved = 0, self.step
