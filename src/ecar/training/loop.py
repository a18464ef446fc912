"""Train a model, or resume: what ``ecar train`` does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from ecar.devices import resolve_device
from ecar.files.lock import run_lock
from ecar.files.options import changed
from ecar.files.records import make_out
from ecar.pretrained.build import build_model
from ecar.processes.signals import Stopped, StopRequest
from ecar.processes.world import World
from ecar.training.build import build_config, check_model, load_table, rows_per_stage, with_data
from ecar.training.config import TrainConfig, Training
from ecar.training.distill import Teacher
from ecar.training.engine.parallel import check_divides, memory_advice
from ecar.training.engine.resume import check_options, keep_options
from ecar.training.engine.trainer import NonFiniteLossError as NonFiniteLossError
from ecar.training.engine.trainer import Trainer
from ecar.training.finetune import Source
from ecar.training.generator import Generator
from ecar.training.held_out import HeldOut
from ecar.training.own_samples import keep_own_samples
from ecar.training.run import save_final
from ecar.training.watch import HeldOutLoss


def train(config: TrainConfig, *, pictures: bool = True) -> Path:
    """Train, or resume the run in ``config.run.out``; returns the folder of the final model.

    Args:
        config: options.
        pictures: whether every checkpoint comes with a grid of samples.

    Raises:
        ValueError: bad options or data, or a run folder that holds a run with other options.
        NonFiniteLossError: ``MAX_BAD_STEPS`` steps in a row without a finite loss.
        Stopped: a signal came; the checkpoint is written.
        OSError: several saves in a row failed, or the last one.
    """
    out, device = make_out(config.run.out, config.data.data), resolve_device(config.run.device)
    world = World.start(device)
    with run_lock(out) if world.rank == 0 else nullcontext(), StopRequest() as stop:
        source = Source.find(config, out)
        asked = source.with_defaults(config) if source else config.resolve()
        options = changed(asked, device=world.local_device(device))
        if world.rank == 0:
            check_options(out, TrainConfig, asked)
        check_divides(options.run.batch_size, rows_per_stage(options), world.size, options.scale.accumulate)
        world.barrier()
        task, watch = _make(options, out, world, source)
        trainer = Trainer(
            task,
            options.run,
            out,
            ema=options.optimizer.ema,
            scale=options.scale,
            world=world,
            stop=stop,
            watch=watch,
            pictures=pictures,
        )
        if world.rank == 0:  # now that the data are accepted too
            keep_options(out, asked)
        try:
            with memory_advice(options.scale.accumulate):
                trainer.run()
        except Stopped:  # by all ranks, after the same step
            world.stop()
            raise
        _finish(trainer, task, watch)
    world.stop()
    return out / "final"


def _make(config: Training, out: Path, world: World, source: Source | None) -> tuple[Generator, HeldOutLoss | None]:
    """Data and model of a run, and its held-out loss."""
    held = HeldOut.open(config)
    if source is not None and config.data.own_samples:
        assert source.tokenizer is not None
        check_model(config, source.tokenizer, source)
        world.from_first(lambda: keep_own_samples(config, source))
    table, tokenizer = load_table(config, source, held)
    kept = None
    if held is not None:
        table, kept = held.tables(config, table, tokenizer)
    torch.manual_seed(config.run.seed)
    wanted = with_data(build_config(config, tokenizer), table)
    model = source.build(config, wanted) if source else build_model(wanted)
    teacher = None
    if config.distill.distill is not None and source is not None:
        teacher = Teacher.load(config, source.fingerprint, source.config, model.config)
        model.config = model.config.replace(sampling=teacher.sampling())
    if config.scale.parallel == "ddp" or world.size == 1:  # slices go to the device block by block
        model = model.to(config.run.device)
    task = Generator(config, model, table, tokenizer, out, source, teacher)
    return task, None if kept is None else HeldOutLoss(task, kept)


def _finish(trainer: Trainer, task: Generator, watch: HeldOutLoss | None) -> None:
    """Write the final models; every rank has slices of them."""
    config, out, source = task.config, task.out, task.source
    for decay in config.optimizer.ema:
        weights = trainer.averaged(decay)
        if trainer.world.rank == 0:
            if watch is not None and decay == config.optimizer.ema[0]:
                weights = watch.best() or weights
            save_final(task.averaged(weights), task.tokenizer, config, out, decay, source)
    if source is not None and trainer.world.rank == 0:
        source.save_adapter(out, task.module.config, trainer.ema.weights)
