"""A plan before anything long begins: what is chosen, why, and how long each part takes on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from ecar.devices import resolve_device
from ecar.evaluation.extractors import Extractor
from ecar.evaluation.reference import read_images
from ecar.fitting.measure import extractor_speed, find_extractor
from ecar.fitting.options import Choices, FitConfig
from ecar.fitting.split import FEW, Split
from ecar.fitting.tokens import Tokens, choose_tokenizer
from ecar.fitting.trials import DISTILLED, NO_START, Measured

SCALES = (1.0, 2.0, 3.5, 1.4)  # of guidance, the first of which are compared
GUIDED = 2.0  # where none are compared
_SIDES = (256, 128, 64, 32)
_ENLARGED = 1.15  # times at most, of half of the pictures
_LOOKED_AT, _AT_256 = 48, 16  # held-out pictures that tokenizers are measured on; large ones
_PASSES, _OF = 20, 2000  # over so many pictures at most: what a training should see at least
_FASTER = 1.5  # times, that smaller pictures have to be
_TOGETHER = 0.9  # of the speed of so many processes that one after the other would have
_LEAST_STEPS, _LEAST_STUDENT, _LEAST_PICTURES = 20, 10, 100
_ENOUGH = 100_000  # pictures seen by fresh weights: below, the plan warns
_WATCH, _DISTIL = 1.06, 1.8  # a step with its share of looks, saves and grids; a step of a student
_STUDENT = 0.1  # of the steps of the training
JUDGED, LEAST_JUDGED = 128, 48  # samples that guidance is chosen by
_PREPARED = 0.18  # share of the time for latents, and features of the pictures
_TOKENIZER, _JUDGED, _CRITIC, _GUIDANCE = 0.25, 0.1, 0.08, 0.08
_JUDGED_AT_MOST = 0.3  # else nothing is judged
_REPORT, _SHOWN, _DRAWN = 10.0, 14, 32  # seconds, and samples for as long as their stages, and they, take


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


def make_plan(config: FitConfig, split: Split, spent: float, processes: int = 1) -> Plan:
    """Choose what is left open, by measuring.

    Args:
        config: options.
        split: the pictures.
        spent: seconds until now.
        processes: that encode, train and sample together.

    Raises:
        ValueError: choices that do not fit the pictures or each other.
    """
    begun = time.perf_counter()
    device, total = resolve_device(config.allowance.device), config.allowance.seconds
    extractor, missing = find_extractor(device)
    sides = [config.choices.resolution] if config.choices.resolution else _sides(split)
    best: tuple[Tokens, Measured, Tensor] | None = None
    for side in sides:
        held = read_images(str(split.held_out), "train", side, side, _AT_256 if side >= 256 else _LOOKED_AT)
        tokens = choose_tokenizer(config.choices.tokenizer, held.images, total, device, extractor)
        measured = Measured.of(config, split, tokens, held, device)
        if best is not None and measured.trial.step > best[1].trial.step / _FASTER:
            break  # smaller pictures would win nothing
        best = tokens, measured.with_batch(config, split, processes), held.images
        seen = total / 2 / measured.trial.step * measured.batch
        if measured.started or seen >= _PASSES * min(split.images, _OF):
            break  # else smaller pictures, of which more are seen
    assert best is not None
    spent += time.perf_counter() - begun
    return _plan(config, split, *best, (extractor, missing), spent, 1 if processes == 1 else _TOGETHER * processes)


def _sides(split: Split) -> list[int]:
    """The largest side that enlarges half of the pictures little, and the next ones as long as they are 128 or more."""
    whole = [side for side in _SIDES if side <= _ENLARGED * split.record["side"]] or [_SIDES[-1]]
    return [whole[0], *(side for side in whole[1:] if side >= 128)]


def _plan(
    config: FitConfig, split: Split, tokens: Tokens, measured: Measured, images: Tensor,
    judge: tuple[Extractor | None, str], spent: float, faster: float,
) -> Plan:  # fmt: skip
    """Fit the parts into the time: what is sure first, training gets the rest. What processes do together is so many
    times ``faster`` than the trial."""
    total, trial, values, choices = config.allowance.seconds, measured.trial, measured.values, config.choices
    step, encode = trial.step / faster, tokens.measured.encode / faster
    extractor, missing = judge
    look = extractor_speed(extractor, images[:16], str(values["device"]))
    _check_asked(choices, split, missing)
    seconds: dict[str, float] = {"check": spent}
    tokenizer_steps, tokenizer_step = _tokenizer_steps(choices, tokens, total)
    if tokenizer_steps:
        seconds["tokenizer"] = tokenizer_steps * tokenizer_step
    held, sides = int(split.record["held_out"]), 2 if config.photographs.flip else 1
    used = split.limited_to(choices.images or _pictures(total, held, sides, encode, look))
    seconds["encode"] = (sides * used + held) * encode
    scales, guiding = _scales(choices, split, trial.sample, look, total if extractor else 0.0)
    # Looked at: a sample, itself mirrored, and, for comparison, a training picture and what the tokenizer makes of it.
    drawn = trial.sample * (2 if scales > 1 or _guidance(choices, split, measured.start) != 1 else 1)
    each = drawn / faster + 5 * look + tokens.measured.encode + tokens.measured.decode
    samples, judged = _samples(choices, used + 3 * held, each, look, total if extractor else 0.0)
    critic = choices.critic_images
    if critic is None:
        critic = min(1000, used)
        critic = critic if critic >= 100 and critic * (drawn + 2 * look) <= _CRITIC * total and samples else 0
    report = _REPORT + (_SHOWN if samples else _SHOWN + _DRAWN) * drawn
    after = judged + guiding + critic * (drawn + 2 * look) + report
    rest = total - sum(seconds.values()) - after - trial.start
    pays = total >= DISTILLED if choices.student_steps is None else choices.student_steps > 0
    distilled = scales > 1 and pays
    share = _WATCH + (_STUDENT * _DISTIL if distilled else 0)
    steps = choices.max_steps or max(_LEAST_STEPS, int(rest / (step * share)))
    student = choices.student_steps
    if student is None:
        student = max(_LEAST_STUDENT, round(_STUDENT * steps)) if distilled else 0
    seconds["train"] = trial.start + steps * step * _WATCH
    seconds |= {"guidance": guiding + student * step * _DISTIL} if scales > 1 else {}
    seconds |= {"evaluate": judged} if samples else {}
    seconds |= {"critic": critic * (drawn + 2 * look)} if critic else {}
    seconds["report"] = report
    resolved = Choices(
        images=used, resolution=values["resolution"][0], tokenizer=tokens.name, tokenizer_steps=tokenizer_steps,
        start=measured.start, lr=values["lr"], preset=values["preset"], stages=values["stages"],
        batch_size=measured.batch, max_steps=steps, compile=int(values["compile"]), scales=scales,
        guidance=_guidance(choices, split, measured.start),
        student_steps=student, samples=samples, critic_images=critic,
    )  # fmt: skip
    why, notes = _why(split, tokens, measured, resolved), _notes(split, step, choices, resolved, missing)
    if (needed := sum(seconds.values())) > 1.2 * total:
        what = "what was asked for" if choices.max_steps else "the least that is worth doing"
        notes.append(f"{what} takes {in_words(needed)}, more than {in_words(total)}")
    return Plan(resolved, seconds, why | ({"note": "; ".join(notes)} if notes else {}))


def _pictures(total: float, held: int, sides: int, encode: float, look: float) -> int:
    """How many can be encoded and looked at in their share of the time."""
    room = _PREPARED * total - held * (encode + 3 * look)
    return max(_LEAST_PICTURES, int(room / max(sides * encode + look, 1e-9)))


def _scales(choices: Choices, split: Split, sample: float, look: float, total: float) -> tuple[int, float]:
    """How many scales of guidance are compared, and the seconds of it."""
    each = (JUDGED if total >= DISTILLED else LEAST_JUDGED) * (2 * sample + look)
    scales = choices.scales
    if scales is None and choices.student_steps:
        scales = len(SCALES)
    elif scales is None:
        left_out = split.classes < 2 or choices.samples == 0 or choices.guidance is not None or not total
        scales = 1 if left_out else max(1, min(len(SCALES), int(_GUIDANCE * total / each)))
    return scales, scales * each if scales > 1 else 0.0


def _guidance(choices: Choices, split: Split, start: str) -> float:
    """Scale where none are compared: a model that starts from another one knows classes after few steps."""
    return choices.guidance or (GUIDED if split.classes > 1 and start != NO_START else 1.0)


def _check_asked(choices: Choices, split: Split, missing: str) -> None:
    """ValueError for parts that were asked for and cannot be done."""
    guided = bool(choices.student_steps) or (choices.scales or 1) > 1 or (choices.guidance or 1) != 1
    if guided and split.classes < 2:
        raise ValueError(
            "`scales`, `guidance` and `student_steps` need two classes or more: without them there is no guidance; "
            "leave them out"
        )
    if choices.student_steps and choices.scales == 1:
        raise ValueError("`student_steps` needs `scales` of 2 or more: one of them is distilled")
    if missing and (choices.student_steps or (choices.scales or 1) > 1 or choices.samples or choices.critic_images):
        raise ValueError(f"`student_steps`, `samples` and `critic_images` must be 0, and `scales` 1: {missing}")


def _tokenizer_steps(choices: Choices, tokens: Tokens, total: float) -> tuple[int, float]:
    """Steps to train the tokenizer, and seconds of one: of ``parts.TOKENIZER_BATCH`` pictures, forward and backward."""
    step = 4 * 16 * (tokens.measured.encode + tokens.measured.decode)
    if choices.tokenizer_steps is not None:
        return choices.tokenizer_steps, step
    return (max(20, int(_TOKENIZER * total / step)) if tokens.train else 0), step


def _samples(choices: Choices, looks: int, each: float, look: float, total: float) -> tuple[int, float]:
    """How many samples are judged at ``each`` seconds, and the seconds of all, with so many ``looks`` at pictures."""
    fixed = look * looks
    if choices.samples is not None:
        return choices.samples, choices.samples * each + fixed if choices.samples else 0.0
    if not total:
        return 0, 0.0
    count = max(32, min(2000, int((_JUDGED * total - fixed) / each)))
    seconds = count * each + fixed
    return (count, seconds) if seconds <= _JUDGED_AT_MOST * total else (0, 0.0)


def _why(split: Split, tokens: Tokens, measured: Measured, choices: Choices) -> dict[str, str]:
    """The choices in words."""
    steps, batch, used = choices.max_steps or 0, measured.batch, choices.images or split.images
    model = f"{choices.preset}, {measured.trial.parameters / 1e6:.1f} M parameters, {choices.stages} stages"
    pictures = f"{used:,}" + (f" of {split.images:,}: encoding more would take too long" if used < split.images else "")
    return {
        "pictures": pictures,
        "resolution": f"{choices.resolution} pixels; half of the pictures have {split.record['side']:g} or more",
        "tokenizer": f"{tokens.name}: {tokens.why}",
        "start": f"{choices.start}; {measured.why}" if measured.why != "as asked" else f"{choices.start}, as asked",
        "model": f"{model}; {batch / measured.trial.step:.3g} images/s measured",
        "steps": f"{steps:,} of {batch} images: {steps * batch / used:.3g} passes over the pictures",
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
        notes.append(f"{split.images} pictures are few: the training stops where it begins to overfit")
    seen, batch = (choices.max_steps or 0) * (choices.batch_size or 1), choices.batch_size or 1
    if seen < _ENOUGH and choices.start == NO_START:
        enough = in_words(_ENOUGH / batch * step)
        notes.append(
            f"so short a training draws blots rather than pictures: it sees {seen:,}, and {_ENOUGH:,} would take "
            f"{enough}"
        )
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
