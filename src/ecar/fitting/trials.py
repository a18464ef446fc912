"""A few steps of a training, from a bundled model and from fresh weights: which is ahead, and how long they take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch

from ecar.config import match_names
from ecar.cost.formulas import training_flops
from ecar.evaluation.reference import RealImages, read_images
from ecar.fitting.measure import Probe, Trial, encoded, table_of, try_training
from ecar.fitting.options import NEW, Choices, FitConfig
from ecar.fitting.split import Split
from ecar.fitting.tokens import POOR, Tokens, same_encoder, token_patch
from ecar.network.presets import Preset, get_preset
from ecar.pretrained.folders import bundled_models, load_config, resolve_model
from ecar.tokenizers import load_tokenizer
from ecar.training.build import build_config
from ecar.training.config import TrainConfig

FRESH_RATE = 2e-3  # learning rate of a training from fresh weights
START_RATE = 5e-4  # of one that starts from a model
NO_START = "none"  # as a start: fresh weights
_TRIED = 16  # pictures to train on in a trial
_TOKENS = 64  # on a CPU, at most: four times as many cost more than they give (docs/log.md)
_LARGER = {"s": (3e17, 5_000), "b": (3e19, 100_000)}  # training FLOPs and pictures from which a larger size pays
_COMPILED = 1800.0  # seconds for everything from which compiling on a CPU pays
DISTILLED = 1800.0  # and from which distilling guidance does
_STEPS, _LEAST_BATCH = 1200, 8  # in the whole time: else a batch is smaller, of so many pictures at least
_UPDATE = 0.4  # of a step that the optimizer may take, whose work is the same for every batch
_TRIED_BATCH = 8  # on a CPU, where a picture takes as long in a small batch
_TRIAL = 0.015  # of the time, for one
_MANY = 2000  # pictures, of which a batch may be larger


@dataclass(frozen=True)
class Measured:
    """A model, its options and its speed.

    Attributes:
        values: options of a training.
        trial: of these.
        why: of its start, in words.
    """

    values: dict[str, Any]
    trial: Trial
    why: str

    @property
    def batch(self) -> int:
        return int(self.values["batch_size"])

    @property
    def start(self) -> str:
        return str(self.values.get("init_from", NO_START))

    @property
    def started(self) -> bool:
        """From a model of pictures of this side: it draws at once."""
        return self.start != NO_START and load_config(resolve_model(self.start)).image_side == (
            self.values["resolution"] * 2
        )

    def with_batch(self, config: FitConfig, split: Split, processes: int) -> Measured:
        """With the batch of the training: a smaller one where the time is enough for few steps only, as long as most of
        a step goes into pictures. (Muon's update of "butterflies" takes as long as 12 pictures.)"""
        asked, most = config.choices.batch_size, 32 if split.images < _MANY else 64
        if str(self.values["device"]).startswith("cuda"):
            most = 128
        batch, update = asked or min(split.images, most), self.trial.update

        def step(of: int) -> float:
            return update + (self.trial.step - update) * of / self.batch

        while asked is None and batch >= 2 * _LEAST_BATCH and update <= _UPDATE * step(batch // 2):
            if config.allowance.seconds >= _STEPS * step(batch):
                break
            batch //= 2
        batch = asked or max(batch - batch % processes, processes)
        return replace(self, values={**self.values, "batch_size": batch}, trial=replace(self.trial, step=step(batch)))

    @classmethod
    def of(cls, config: FitConfig, split: Split, tokens: Tokens, held: RealImages, device: str) -> Measured:
        """From fresh weights, or from a bundled model where that is ahead after as many steps."""
        choices, side = config.choices, held.images.shape[-1]
        probe = _probe(config, split, tokens, held, device)
        values = _values(config, split, tokens.tokenizer.latent_side(side, side)[0], side, device)
        starts = _starts(choices, values, tokens)
        if choices.start not in (None, NO_START):
            if not starts:
                raise ValueError(f"`start` {choices.start} has other latents or sizes than what was asked for")
            return cls(starts[0], try_training(starts[0], probe), "as asked")
        trial = try_training(values, probe)
        found = cls(values, trial, f"held-out error after {trial.steps} steps from fresh weights {trial.loss:.3f}")
        for preset, (flops, images) in _LARGER.items() if choices.preset is None else ():
            shape = build_config(TrainConfig.of(data="-", out="-", **values).resolve(), tokens.tokenizer)
            per_image = training_flops(shape, (1.0,) * len(shape.stages.sides))
            total = config.allowance.seconds / found.trial.step * found.batch * per_image
            if total >= flops and split.images >= images:
                values, starts = {**values, "preset": f"{preset}/{get_preset(values['preset']).patch}"}, []
                found = cls(values, try_training(values, probe), "there is time for a larger model")
        for one in starts:
            trial = try_training(one, probe, found.trial.steps)
            said = f"{found.why}, from {one['init_from']} {trial.loss:.3f}"
            found = cls(one, trial, said) if trial.loss < found.trial.loss else cls(found.values, found.trial, said)
        return found


def _values(config: FitConfig, split: Split, latent: int, side: int, device: str) -> dict[str, Any]:
    """Options of a training from fresh weights."""
    choices, allowance = config.choices, config.allowance
    cuda, host = device.startswith("cuda"), shutil.which("g++") is not None
    preset = choices.preset or f"nano/{token_patch(latent) if cuda else token_patch(latent, _TOKENS)}"
    patch = get_preset(preset).patch
    return {
        "resolution": (side,), "preset": preset,
        "stages": choices.stages or (2 if latent % (2 * patch) == 0 else 1),
        "batch_size": choices.batch_size or min(split.images, 128 if cuda else _TRIED_BATCH),
        "compile": bool(choices.compile) if choices.compile is not None
        else cuda or (host and allowance.seconds >= _COMPILED),
        "device": device, "optimizer": "muon", "lr": choices.lr or FRESH_RATE, "seed": allowance.seed,
    }  # fmt: skip


def _starts(choices: Choices, values: dict[str, Any], tokens: Tokens) -> list[dict[str, Any]]:
    """The same options from each bundled model, or from the one that was asked for, whose latents these are and whose
    sizes nothing speaks against."""
    if choices.start == NO_START or tokens.name == NEW or (tokens.train and tokens.measured.psnr < POOR):
        return []
    found = []
    for name in [choices.start] if choices.start else bundled_models():
        folder = resolve_model(name)
        before = load_config(folder)
        theirs = {"preset": str(Preset.of(before)), "stages": len(before.stages.sides)}
        asked = {key: getattr(choices, key) for key in theirs if getattr(choices, key) is not None}
        if "preset" in asked:
            asked["preset"] = str(get_preset(asked["preset"]))
        latent = tokens.measured.latents.shape[-1]
        divides = latent % (before.patch * 2 ** (len(before.stages.sides) - 1)) == 0
        fits = divides and asked.items() <= theirs.items() and before.kind == "ecar"
        if fits and same_encoder(load_tokenizer(folder / "tokenizer"), tokens.tokenizer):
            found.append({**values, **theirs, "init_from": name, "lr": choices.lr or START_RATE})
    return found


def _probe(config: FitConfig, split: Split, tokens: Tokens, held: RealImages, device: str) -> Probe:
    """Latents of some pictures of both parts of the split."""
    side = held.images.shape[-1]
    some = read_images(str(split.train), "train", side, side, _TRIED)
    latents = encoded(tokens.tokenizer.to(device), some.images, device)[0]
    tokens.tokenizer.to("cpu")
    places = match_names(held.class_names, some.class_names)
    labels = torch.tensor([places[i] for i in range(len(held.class_names))])[held.labels] if places else held.labels
    tables = [
        table_of(z, own, some.class_names, tokens.tokenizer, side)
        for z, own in ((latents, some.labels), (tokens.measured.latents, labels))
    ]
    return Probe(tokens.tokenizer, tables[0], tables[1], _TRIAL * config.allowance.seconds)
