"""A plan before anything long begins: what is chosen, why, and how long each part takes on this machine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ecar.cost.formulas import training_flops
from ecar.devices import resolve_device
from ecar.evaluation.reference import read_images
from ecar.fitting.measure import Speed, extractor_speed, training_speed
from ecar.fitting.options import Choices, FitConfig
from ecar.fitting.split import FEW, Split
from ecar.fitting.tokens import Tokens, choose_tokenizer, token_patch
from ecar.training.build import build_config
from ecar.training.config import TrainConfig

SCALES = (1.0, 1.5, 2.5)  # of guidance, one of which is chosen
_SIDES = (256, 128, 64, 32)
_ENLARGED = 1.15  # times at most, of half of the pictures
_LOOKED_AT = 48  # held-out pictures that tokenizers are measured on
_PASSES, _OF = 20, 2000  # over so many pictures at most: what a training should see at least
_FASTER = 1.5  # times, that smaller pictures have to be
_LARGER = {"s": (3e17, 5_000), "b": (3e19, 100_000)}  # training FLOPs and pictures from which a larger size pays
_COMPILED = 1800.0  # seconds for everything from which compiling on a CPU pays
_LEAST_STEPS, _LEAST_STUDENT = 20, 10
_FEW_STEPS = 3000  # below, the plan warns; ecar train takes 10,000 by default
_WATCH, _DISTIL = 1.06, 1.8  # a step with its share of looks, saves and grids; a step of a student
_STUDENT = 0.1  # of the steps of the training
JUDGED = 128  # samples that guidance is chosen by, at most
_TOKENIZER, _JUDGED, _CRITIC, _GUIDANCE = 0.25, 0.12, 0.08, 0.15  # shares of the time
_JUDGED_AT_MOST = 0.3  # else nothing is judged
_REPORT = 10.0  # seconds


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        choices: nothing is left open.
        seconds: of every part, about, in order.
        why: of the choices that were made here, in words.
    """

    choices: Choices
    seconds: dict[str, float]
    why: dict[str, str]

    def in_words(self, split: Split, minutes: float) -> list[str]:
        """Lines for people."""
        pictures = (
            f"{split.images:,} pictures of {split.classes} classes" if split.classes else f"{split.images:,} pictures"
        )
        lines = [f"plan for {pictures}, {split.record['held_out']} more held out, {minutes:g} min:"]
        lines += [f"  {name:11} {text}" for name, text in self.why.items()]
        lines += [f"  {name:11} {in_words(seconds)}" for name, seconds in self.seconds.items()]
        return [*lines, f"  {'in all':11} {in_words(sum(self.seconds.values()))}"]


def make_plan(config: FitConfig, split: Split, spent: float) -> Plan:
    """Choose what is left open, by measuring.

    Args:
        config: options.
        split: the pictures.
        spent: seconds until now.

    Raises:
        ValueError: choices that do not fit the pictures or each other.
    """
    device = resolve_device(config.allowance.device)
    sides = [config.choices.resolution] if config.choices.resolution else _sides(split)
    best: tuple[Tokens, _Measured, Tensor] | None = None
    for side in sides:
        images = read_images(str(split.held_out), "train", side, side, _LOOKED_AT).images
        tokens = choose_tokenizer(config.choices.tokenizer, images, config.allowance.seconds, device)
        measured = _Measured.of(config, split, tokens, side, device)
        if best is not None and measured.speed.step > best[1].speed.step / _FASTER:
            break  # smaller pictures would win nothing
        best = tokens, measured, images
        seen = config.allowance.seconds / 2 / measured.speed.step * measured.batch
        if seen >= _PASSES * min(split.images, _OF):
            break  # else smaller pictures, of which more are seen
    assert best is not None
    return _plan(config, split, *best, spent)


@dataclass(frozen=True)
class _Measured:
    """A model of a preset, its options and its speed."""

    values: dict[str, Any]
    speed: Speed

    @property
    def batch(self) -> int:
        return int(self.values["batch_size"])

    @classmethod
    def of(cls, config: FitConfig, split: Split, tokens: Tokens, side: int, device: str) -> _Measured:
        choices, allowance = config.choices, config.allowance
        latent = tokens.tokenizer.latent_side(side, side)[0]
        patch = choices.patch or token_patch(latent)
        cuda, host = device.startswith("cuda"), shutil.which("g++") is not None
        values: dict[str, Any] = {
            "resolution": (side,), "preset": choices.preset or "nano", "patch": patch,
            "stages": choices.stages or (2 if latent % (2 * patch) == 0 else 1),
            "batch_size": choices.batch_size or min(split.images, 128 if cuda else 32 if split.images < 2000 else 64),
            "compile": bool(choices.compile) if choices.compile is not None
            else cuda or (host and allowance.seconds >= _COMPILED),
            "device": device, "optimizer": "muon", "lr": 2e-3, "seed": allowance.seed,
        }  # fmt: skip
        found = cls(values, training_speed(values, tokens.tokenizer, split.classes))
        for preset, (flops, images) in _LARGER.items() if choices.preset is None else ():
            shape = build_config(TrainConfig.of(data="-", out="-", **values).resolve(), tokens.tokenizer)
            per_image = training_flops(shape, (1.0,) * len(shape.stages.sides))
            total = allowance.seconds / found.speed.step * found.batch * per_image
            if total >= flops and split.images >= images:
                values = {**values, "preset": preset}
                found = cls(values, training_speed(values, tokens.tokenizer, split.classes))
        return found


def _sides(split: Split) -> list[int]:
    """The largest side that enlarges half of the pictures little, and the next ones as long as they are 128 or more."""
    whole = [side for side in _SIDES if side <= _ENLARGED * split.record["side"]] or [_SIDES[-1]]
    return [whole[0], *(side for side in whole[1:] if side >= 128)]


def _plan(config: FitConfig, split: Split, tokens: Tokens, measured: _Measured, images: Tensor, spent: float) -> Plan:
    """Fit the parts into the time: what is sure first, training gets the rest."""
    total, speed, values, choices = config.allowance.seconds, measured.speed, measured.values, config.choices
    extractor, look, missing = extractor_speed(images[:16], str(values["device"]))
    _check_asked(choices, split, missing)
    copies = (2 if config.photographs.flip else 1) * split.images + int(split.record["held_out"])
    seconds: dict[str, float] = {"check": spent}
    tokenizer_steps, tokenizer_step = _tokenizer_steps(choices, tokens, total)
    if tokenizer_steps:
        seconds["tokenizer"] = tokenizer_steps * tokenizer_step
    seconds["encode"] = copies * tokens.measured.encode
    # Looked at: a sample, itself mirrored, and, for comparison, a training picture and what the tokenizer makes of it.
    each = speed.sample + 5 * look + tokens.measured.encode + tokens.measured.decode
    samples, judged = _samples(choices, split, each, look, total if extractor else 0.0)
    scales = len(SCALES) * min(samples, JUDGED) * (2 * speed.sample + look)
    guided = split.classes > 1 and samples > 0 and (bool(choices.student_steps) or scales <= _GUIDANCE * total)
    scales = scales if guided else 0.0
    critic = choices.critic_images
    if critic is None:
        critic = min(1000, split.images)
        critic = critic if critic >= 100 and critic * (speed.sample + 2 * look) <= _CRITIC * total and samples else 0
    after = judged + scales + critic * (speed.sample + 2 * look) + _REPORT
    rest = total - sum(seconds.values()) - after - speed.start
    share = _WATCH + (_STUDENT * _DISTIL if guided else 0)
    steps = choices.max_steps or max(_LEAST_STEPS, int(rest / (speed.step * share)))
    student = choices.student_steps
    if student is None:
        student = max(_LEAST_STUDENT, round(_STUDENT * steps)) if guided else 0
    seconds["train"] = speed.start + steps * speed.step * _WATCH
    seconds |= {"guidance": scales + student * speed.step * _DISTIL} if student else {}
    seconds |= {"evaluate": judged} if samples else {}
    seconds |= {"critic": critic * (speed.sample + 2 * look)} if critic else {}
    seconds["report"] = _REPORT
    resolved = Choices(
        resolution=values["resolution"][0], tokenizer=tokens.name, tokenizer_steps=tokenizer_steps,
        preset=values["preset"], stages=values["stages"], patch=values["patch"], batch_size=measured.batch,
        max_steps=steps, compile=int(values["compile"]), student_steps=student, samples=samples, critic_images=critic,
    )  # fmt: skip
    why, notes = _why(split, tokens, measured, resolved), _notes(split, speed.step, choices, resolved, missing)
    if (needed := sum(seconds.values())) > 1.2 * total:
        what = "what was asked for" if choices.max_steps else "the least that is worth doing"
        notes.append(f"{what} takes {in_words(needed)}, more than {in_words(total)}")
    return Plan(resolved, seconds, why | ({"note": "; ".join(notes)} if notes else {}))


def _check_asked(choices: Choices, split: Split, missing: str) -> None:
    """ValueError for parts that were asked for and cannot be done."""
    if choices.student_steps and split.classes < 2:
        raise ValueError("`student_steps` needs two classes or more: without them there is no guidance; leave it out")
    if missing and any((choices.student_steps, choices.samples, choices.critic_images)):
        raise ValueError(f"`student_steps`, `samples` and `critic_images` must be 0: {missing}")


def _tokenizer_steps(choices: Choices, tokens: Tokens, total: float) -> tuple[int, float]:
    """Steps to train the tokenizer, and seconds of one: of ``parts.TOKENIZER_BATCH`` pictures, forward and backward."""
    step = 4 * 16 * (tokens.measured.encode + tokens.measured.decode)
    if choices.tokenizer_steps is not None:
        return choices.tokenizer_steps, step
    return (max(20, int(_TOKENIZER * total / step)) if tokens.train else 0), step


def _samples(choices: Choices, split: Split, each: float, look: float, total: float) -> tuple[int, float]:
    """How many samples are judged at ``each`` seconds, and the seconds of all, with a ``look`` at every picture."""
    fixed = look * (split.images + 3 * int(split.record["held_out"]))
    if choices.samples is not None:
        return choices.samples, choices.samples * each + fixed if choices.samples else 0.0
    if not total:
        return 0, 0.0
    count = max(32, min(2000, int((_JUDGED * total - fixed) / each)))
    seconds = count * each + fixed
    return (count, seconds) if seconds <= _JUDGED_AT_MOST * total else (0, 0.0)


def _why(split: Split, tokens: Tokens, measured: _Measured, choices: Choices) -> dict[str, str]:
    """The choices in words."""
    steps, batch = choices.max_steps or 0, measured.batch
    model = f"{choices.preset}, {measured.speed.parameters / 1e6:.1f} M parameters, {choices.stages} stages"
    return {
        "resolution": f"{choices.resolution} pixels; half of the pictures have {split.record['side']:g} or more",
        "tokenizer": f"{tokens.name}: {tokens.why}",
        "model": f"{model}; {batch / measured.speed.step:.3g} images/s measured",
        "steps": f"{steps:,} of {batch} images: {steps * batch / split.images:.3g} passes over the pictures",
    }


def _notes(split: Split, step: float, asked: Choices, choices: Choices, missing: str) -> list[str]:
    """What to know before it begins.

    Args:
        step: seconds of a training step.
        asked: what was not left open.
        choices: everything.
        missing: why nothing can be judged, if so.
    """
    notes = []
    if split.images < FEW:
        notes.append(f"{split.images} pictures are few: the training stops where it begins to learn them by heart")
    if (choices.max_steps or 0) < _FEW_STEPS:
        enough = in_words(_FEW_STEPS * step)
        notes.append(f"so few steps draw noise rather than pictures: {_FEW_STEPS:,} would take {enough}")
    if missing:
        notes.append(f"nothing is judged, and guidance stays as it is: {missing}")
    elif not choices.samples and asked.samples is None:
        notes.append("there is too little time to judge samples")
    return notes


def in_words(seconds: float) -> str:
    """A duration: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
