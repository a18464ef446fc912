"""What a run is made of: its latents, and the configuration of its model."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch

from ecar.config import CONTEXT_NOISE, ModelConfig, SamplingConfig, StageConfig
from ecar.data.latents import LatentTable, encode_source
from ecar.data.shards import is_cache, load_latents
from ecar.data.source import load_source
from ecar.devices import images_at_once
from ecar.network.presets import default_steps
from ecar.stages import make_plan, pyramid, velocity_std
from ecar.tokenizers import Tokenizer, load_tokenizer
from ecar.training.config import Training
from ecar.training.finetune import Source
from ecar.training.held_out import HeldOut
from ecar.training.own_samples import read_own_samples
from ecar.training.shape import through

_STATISTICS_IMAGES = 5000


def rows_per_stage(config: Training) -> tuple[int, ...]:
    """How many images of a batch go through each stage."""
    return tuple(max(1, round(part * config.run.batch_size)) for part in through(config.stages.stage_share))


def load_table(
    config: Training, source: Source | None = None, held: HeldOut | None = None
) -> tuple[LatentTable, Tokenizer]:
    """The latents to train on: a cache as it is, or images encoded now, after every option has been checked, and
    whether ``held`` is data of the same kind. The tokenizer of ``source`` is the default."""
    data, side = config.data, config.model.image_side

    def accept(names: tuple[str, ...], tokenizer: str) -> None:
        """ValueError where classes or latents are none for a teacher, or for what is held out."""
        if source is not None:
            source.check_classes(config, names)
        if held is not None:
            held.check(config, names, tokenizer)

    if source is not None and data.own_samples:
        data.check_unused(data.data, "samples of the model itself")
        accept(source.config.class_names, source.config.tokenizer)
        return _own_table(config, source)
    if is_cache(data.data):
        data.check_unused(data.data, "a latent cache")
        table, tokenizer = load_latents(data.data)
        check_model(config, tokenizer, source)
        accept(table.class_names, table.tokenizer)
        known = (table.tokenizer, table.encoder)
        if data.tokenizer is not None and load_tokenizer(data.tokenizer).fingerprint() not in known:
            raise ValueError(
                f"--data {data.data} holds latents of another tokenizer than --tokenizer; "
                "leave --tokenizer out: the cache has its own"
            )
        if table.image_side != side:
            raise ValueError(f"--data {data.data} holds images of {table.image_side}, not {side}")
        if data.flip and table.mirrors == 1:
            raise ValueError(f"--data {data.data} holds no mirrored images; encode with --flip")
        return table.part(flip=data.flip, images=None), tokenizer
    own = source.tokenizer if source and data.tokenizer is None else None
    tokenizer = own or load_tokenizer(data.tokenizer or "pixels")
    check_model(config, tokenizer, source)
    images = load_source(data.data, data.reading())
    if config.model.architecture.kind == "dit" and not images.class_names:
        raise ValueError(f"--preset {config.model.preset} needs classes; {data.data} has no labels")
    accept(images.class_names, tokenizer.fingerprint())
    return encode_source(images, tokenizer, side, flip=data.flip, device=config.run.device), tokenizer


def _own_table(config: Training, source: Source) -> tuple[LatentTable, Tokenizer]:
    """The samples of the source that ``keep_own_samples`` drew."""
    assert source.tokenizer is not None  # kept with the run: these latents are no cache
    latents, labels, content = read_own_samples(config, source)
    table = LatentTable(
        latents=latents[None],
        labels=labels,
        class_names=source.config.class_names,
        image_side=source.config.image_side,
        tokenizer=source.tokenizer.fingerprint(),
        content=content,
    )
    return table, source.tokenizer


def check_model(config: Training, tokenizer: Tokenizer, source: Source | None) -> None:
    """ValueError where options, tokenizer and source make no model."""
    model = build_config(config, tokenizer)
    if source is not None:
        source.check(config, model)


def build_config(config: Training, tokenizer: Tokenizer) -> ModelConfig:
    """The model that the options and the tokenizer ask for, without what only the data can tell.

    Raises:
        ValueError: sides that do not divide, sizes that do not fit each other.
    """
    shape, preset, stages = config.model, config.model.architecture, config.stages
    side, count = tokenizer.latent_side(*shape.image_side), len(stages.stages)
    return ModelConfig(
        stages=StageConfig.for_latent(side, count, ends=stages.stages),
        channels=tokenizer.channels,
        **asdict(preset),
        context_noise=0.0 if preset.kind == "dit" else CONTEXT_NOISE,
        image_side=shape.image_side,
        sampling=SamplingConfig(
            steps=(25,) if count == 1 else default_steps(count), guidance=(1.0,) * count, solver="ab2"
        ),
    )


def with_data(model: ModelConfig, table: LatentTable) -> ModelConfig:
    """``model`` with the classes, the tokenizer and the velocity scales of the data."""
    plan = make_plan(model.stages)
    every = max(1, len(table) // _STATISTICS_IMAGES)  # spread out: folders are sorted by class
    rows = torch.arange(0, len(table), every)
    squares = [0.0] * len(plan)  # of the velocities, summed over the rows
    for number, part in enumerate(rows.split(16 * images_at_once(*table.image_side))):
        maps = pyramid(table.batch(torch.zeros_like(part), part, number), len(plan))
        squares = [q + len(part) * velocity_std(s, z) ** 2 for q, s, z in zip(squares, plan, maps, strict=True)]
    return model.replace(
        num_classes=len(table.class_names),
        class_names=table.class_names,
        velocity_std=tuple(round(math.sqrt(square / len(rows)), 6) for square in squares),
        tokenizer=table.tokenizer,
    )
