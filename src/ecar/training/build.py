"""What a run is made of: its latents, and the configuration of its model."""

from __future__ import annotations

import math

import torch

from ecar.config import ModelConfig, SamplingConfig, StageConfig
from ecar.data.latents import LatentTable, MemoryTable, encode_source
from ecar.data.shards import is_cache, load_latents
from ecar.data.source import load_source
from ecar.devices import images_at_once
from ecar.network.presets import default_steps, get_preset
from ecar.stages import make_plan, pyramid, velocity_std
from ecar.tokenizers import Tokenizer, load_tokenizer
from ecar.training.config import TrainConfig
from ecar.training.finetune import Source
from ecar.training.own_samples import read_own_samples

_STATISTICS_IMAGES = 5000


def rows_per_stage(config: TrainConfig) -> tuple[int, ...]:
    """How many images of a batch train each stage."""
    return tuple(max(1, round(share * config.batch_size)) for share in config.stage_share)


def load_table(config: TrainConfig, source: Source | None = None) -> tuple[LatentTable, Tokenizer]:
    """The latents to train on: a cache as it is, or images encoded now, after every option has been checked. The
    tokenizer of ``source`` is the default."""
    own = source.tokenizer if source else None
    if source is not None and config.own_samples:
        config.check_unused(config.data, "samples of the model itself")
        return _own_table(config, source)
    if is_cache(config.data):
        config.check_unused(config.data, "a latent cache")
        table, tokenizer = load_latents(config.data)
        check_model(config, tokenizer, source)
        if source is not None:
            source.check_classes(config, table.class_names)
        known = (table.tokenizer, table.encoder)
        if config.tokenizer is not None and load_tokenizer(config.tokenizer).fingerprint() not in known:
            raise ValueError(
                f"--data {config.data} holds latents of another tokenizer than --tokenizer; "
                "leave --tokenizer out: the cache has its own"
            )
        if table.image_side != config.image_side:
            raise ValueError(f"--data {config.data} holds images of {table.image_side}, not {config.image_side}")
        if config.flip and table.sides == 1:
            raise ValueError(f"--data {config.data} holds no mirrored images; encode with --flip")
        return table.part(flip=config.flip, images=config.max_images), tokenizer
    tokenizer = own if own is not None and config.tokenizer is None else load_tokenizer(config.tokenizer or "pixels")
    check_model(config, tokenizer, source)
    images = load_source(config.data, config.reading(), max_images=config.max_images)
    if config.model == "dit" and not images.class_names:
        raise ValueError(f"--model dit needs classes; {config.data} has no labels")
    if source is not None:
        source.check_classes(config, images.class_names)
    return encode_source(images, tokenizer, config.image_side, flip=config.flip, device=config.device), tokenizer


def _own_table(config: TrainConfig, source: Source) -> tuple[LatentTable, Tokenizer]:
    """The samples of the source that ``keep_own_samples`` drew."""
    assert source.tokenizer is not None  # kept with the run: these latents are no cache
    latents, labels, content = read_own_samples(config, source)
    table = MemoryTable(
        latents=latents[None],
        labels=labels,
        class_names=source.config.class_names,
        image_side=source.config.image_side,
        tokenizer=source.tokenizer.fingerprint(),
        content=content,
    )
    return table, source.tokenizer


def check_model(config: TrainConfig, tokenizer: Tokenizer, source: Source | None) -> None:
    """ValueError where options, tokenizer and source make no model."""
    model = build_config(config, tokenizer)
    if source is not None:
        source.check(config, model)


def build_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model that the options and the tokenizer ask for, without what only the data can tell.

    Raises:
        ValueError: sides that do not divide, an unknown preset, sizes that do not fit each other.
    """
    assert config.model and config.rho is not None and config.context_noise is not None
    side, preset = tokenizer.latent_side(*config.image_side), get_preset(config.preset or "ti")
    stages, dit = config.num_stages, config.model == "dit"
    trunk = 0 if dit else preset.trunk_depth
    return ModelConfig(
        kind=config.model,
        stages=StageConfig.for_latent(side, stages, ends=config.ends, rho=config.rho),
        channels=tokenizer.channels,
        patch=1 if config.patch is None else config.patch,
        width=preset.width if config.width is None else config.width,
        heads=preset.heads if config.heads is None else config.heads,
        trunk_depth=trunk if config.trunk_depth is None else config.trunk_depth,
        head_depth=preset.depth - trunk if config.head_depth is None else config.head_depth,
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
