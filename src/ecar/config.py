"""Configurations: frozen, keyword-only, validated when made, JSON in and out. Saved beside the weights."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

Side = tuple[int, int]
MODEL_KINDS = ("ecar", "dit")
PATHS = ("data", "val_data", "tokenizer", "init_from")  # options of a training that may be places on a machine
STAGE_END = 0.7  # b_k of every stage but the last: docs/method.md
RHO = 0.7
CONTEXT_NOISE = 0.3
_SYMBOLS = "#%&*@!?"  # Unicode has them among the punctuation; others are symbols ("+") there
_SELECTORS = {chr(code) for code in range(0xFE00, 0xFE10)}  # Unicode's choice between drawings of one sign


class JsonConfig:
    """Mixin for dataclasses: ``to_json`` / ``from_json``; unknown or missing keys are errors."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        record: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The inverse of ``to_json``; ValueError names unknown and missing fields, and values of another type."""
        if not isinstance(record, dict):
            raise ValueError(f"{cls.__name__}: expected an object, got {record!r}")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(record) - set(fields))
        needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
        missing = sorted(needed - set(record))
        if unknown or missing:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}, missing fields {missing}")
        hints = typing.get_type_hints(cls)
        values = {}
        for name, value in record.items():
            try:
                values[name] = _restore(hints[name], value)
            except ValueError as error:
                raise ValueError(f"{cls.__name__}: {name}: {error}") from None
        return cls(**values)


def image_side(resolution: Sequence[int]) -> Side:
    """(height, width) of an option that takes one side, or both; ValueError for anything else."""
    if len(resolution) not in (1, 2) or min(resolution) < 1:
        raise ValueError(f"--resolution takes one side, or height and width; got {resolution}")
    return resolution[0], resolution[-1]


def check_acceptance(acceptance: float, candidates: int) -> None:
    """ValueError for a share out of range, or where there is nothing to accept."""
    if not 0 < acceptance < 1:
        raise ValueError(f"acceptance must be between 0 and 1, got {acceptance}")
    if candidates == 1:
        raise ValueError("`acceptance` needs `candidates` 2 or more: so many are drawn for an image at most")


def plain_name(name: str) -> str:
    """A class name without case and separators (blanks, dashes, dots, commas, ...): how names are compared.

    However it was typed: composed or not, wide or narrow letters. What tells classes apart stays: symbols ("C++" is not
    "C#"), marks of letters (dots on a "u"), and that there was something between digits ("1.5" is not "15").
    """
    if name.isascii() and name.isalnum():
        return name.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    kept: list[str] = []
    apart = False
    for c in folded:
        if c.isalnum() or c in _SYMBOLS or (unicodedata.category(c)[0] in "SM" and c not in _SELECTORS):
            kept += [" ", c] if apart and kept and kept[-1].isdigit() and c.isdigit() else [c]
            apart = False
        else:
            apart = True
    return "".join(kept)


def match_names(ours: Sequence[str], theirs: Sequence[str]) -> dict[int, int]:
    """Place in ``ours`` -> place in ``theirs`` of the same class: the same name, else the same ``plain_name`` where
    neither list has it twice. Of a name that both have several times the first is the first, and so on."""
    places = {key: i for i, key in enumerate(_numbered(theirs))}
    found = {i: places[key] for i, key in enumerate(_numbered(ours)) if key in places}
    plain, known = [plain_name(name) for name in ours], [plain_name(name) for name in theirs]
    often, seen = Counter(plain), Counter(known)
    once = {name: i for i, name in enumerate(known) if name and often[name] == seen[name] == 1}
    return {i: found.get(i, once.get(name, -1)) for i, name in enumerate(plain) if i in found or name in once}


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """The same classes in the same order, by ``match_names``."""
    return len(ours) == len(theirs) and match_names(ours, theirs) == {i: i for i in range(len(ours))}


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with how often it was there before."""
    before: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, before[name]))
        before[name] += 1
    return keys


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed between two records of JSON types, for messages ("seed 0 -> 7; ..."); empty if nothing did."""
    return "; ".join(f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v)


def _restore(hint: Any, value: Any) -> Any:
    """JSON lists -> tuples, nested objects -> configs; ValueError where the value has another type than ``hint``."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(hint, type) and issubclass(hint, JsonConfig):
        return hint.from_json(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_restore(inner, item) for item in value)
    if isinstance(hint, type):
        kinds = (int, float) if hint is float else hint
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{value!r} is not of type {hint.__name__}")
    elif typing.get_origin(hint) is tuple:
        raise ValueError(f"{value!r} is not a list")
    return value


def start_level(end_before: float, rho: float) -> float:
    """a_k from b_{k-1} (Eq. 4): the level at which the upsampled map, rescaled, has the noise share 1 - a_k."""
    return rho * end_before / (2 * (1 - end_before) + rho * end_before)


@dataclass(frozen=True, kw_only=True)
class StageConfig(JsonConfig):
    """The stages, coarse to fine."""

    sides: tuple[Side, ...] = ((4, 4), (8, 8))
    """(height, width) of each stage's map in latent positions; each twice the one before. One entry: flow matching."""
    ends: tuple[float, ...] = (STAGE_END, 1.0)
    """b_k: share of data in the map at the end of each stage, in (0, 1); the last is 1."""
    rho: float = RHO
    """Share of the coarse stage's noise that the next stage keeps, in [0, 1]; 1 is the pyramidal-flow jump."""

    def __post_init__(self) -> None:
        if not self.sides:
            raise ValueError("sides: at least one stage is needed")
        if any(h < 1 or w < 1 for h, w in self.sides):
            raise ValueError(f"sides must be positive, got {self.sides}")
        for (h, w), (h2, w2) in pairwise(self.sides):
            if (2 * h, 2 * w) != (h2, w2):
                raise ValueError(f"sides: each stage must double the one before, got {h}x{w} then {h2}x{w2}")
        if len(self.ends) != len(self.sides):
            raise ValueError(f"ends needs one entry per stage ({len(self.sides)}), got {self.ends}")
        if self.ends[-1] != 1.0 or any(not 0 < b < 1 for b in self.ends[:-1]):
            raise ValueError(f"ends: every stage but the last ends in (0, 1), the last at 1; got {self.ends}")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {self.rho}")
        for before, end in pairwise(self.ends):
            start = start_level(before, self.rho)
            if end <= start:
                raise ValueError(f"ends: a stage that starts at {start:.3f} (after {before}) cannot end at {end}")

    @classmethod
    def for_latent(cls, side: Side, stages: int, *, ends: tuple[float, ...] | None = None, rho: float = RHO) -> Self:
        """``stages`` maps that end at ``side``; ValueError if it does not divide."""
        scale = 2 ** (stages - 1)
        if side[0] % scale or side[1] % scale:
            raise ValueError(f"a latent map of {side[0]}x{side[1]} does not divide into {stages} stages (by {scale})")
        sides = tuple((side[0] * 2**k // scale, side[1] * 2**k // scale) for k in range(stages))
        return cls(sides=sides, ends=ends if ends is not None else (STAGE_END,) * (stages - 1) + (1.0,), rho=rho)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(JsonConfig):
    """Defaults of sampling, one entry per stage; saved with the model, overridden by arguments."""

    steps: tuple[int, ...]
    """Solver steps per stage."""
    guidance: tuple[float, ...]
    """Guidance scale per stage; 1 is off."""
    solver: str = "euler"
    """euler, heun or ab2 (Adams-Bashforth, two steps)."""
    guidance_from: tuple[float, ...] = ()
    """Time of each stage, in [0, 1), from which guidance acts (two head passes a step; before it one).
    Empty: everywhere."""
    fixed_steps: bool = False
    """The model was distilled for just these steps and this solver; others give worse images."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(JsonConfig):
    """Everything needed to build the network, and what its latents mean."""

    stages: StageConfig
    """The stage plan."""
    channels: int
    """Channels of the latent."""
    kind: str = "ecar"
    """ecar, or dit: the baseline, a single stage."""
    patch: int = 1
    """Side of the squares of latent positions that trunk and head (or DiT) read as one token."""
    width: int = 128
    """Width of trunk and head."""
    heads: int = 4
    """Attention heads; width / heads must be a multiple of 4 (2-D rotary embedding)."""
    trunk_depth: int = 2
    """Blocks of the trunk; 0 for dit, which has none."""
    head_depth: int = 5
    """Blocks of the head."""
    num_classes: int = 0
    """Number of classes; 0 is unconditional. The null class of guidance is an additional row."""
    class_names: tuple[str, ...] = ()
    """A name per class, or empty."""
    context_noise: float = CONTEXT_NOISE
    """Standard deviation of the Gaussian noise on the maps that the trunk reads, in training and sampling."""
    velocity_std: tuple[float, ...] = ()
    """Standard deviation of each stage's velocity, measured on the training data; empty: all 1."""
    image_side: Side = (32, 32)
    """(height, width) of the images in pixels."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer whose latents these are; empty: unchecked."""
    sampling: SamplingConfig | None = None
    """Default sampling settings."""

    def __post_init__(self) -> None:
        if self.kind not in MODEL_KINDS:
            raise ValueError(f"kind must be one of {', '.join(MODEL_KINDS)}, got {self.kind!r}")
        for name in ("channels", "patch", "width", "heads", "head_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind == "ecar" and self.trunk_depth < 1:
            raise ValueError(f"ecar needs a trunk_depth of at least 1, got {self.trunk_depth}")
        side = self.stages.sides[-1]
        first = self.stages.sides[0]
        if first[0] % self.patch or first[1] % self.patch:
            raise ValueError(
                f"the map of every stage must divide by patch {self.patch}, and the first one is {first[0]}x{first[1]}"
            )
        if self.kind == "dit" and side[0] != side[1]:
            raise ValueError(f"dit needs a square latent, got {side}")
        if self.kind == "dit" and self.trunk_depth != 0:
            raise ValueError(f"dit needs trunk_depth 0, got {self.trunk_depth}")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"width {self.width} / heads {self.heads} must be a multiple of 4")
        if self.num_classes < 0 or (self.class_names and len(self.class_names) != self.num_classes):
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if not 0 <= self.context_noise < math.inf:
            raise ValueError(f"context_noise must be a number of at least 0, got {self.context_noise}")
        if self.velocity_std and len(self.velocity_std) != len(self.stages.sides):
            raise ValueError(f"velocity_std needs one entry per stage, got {self.velocity_std}")

    @property
    def has_trunk(self) -> bool:
        """Whether there is a trunk, with stages to read; dit is all head."""
        return self.trunk_depth > 0

    @property
    def null_class(self) -> int:
        """Row of the class table that stands for "no class"."""
        return self.num_classes

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What a model card says that the model does not know."""

    license: str | None = None
    """Licence of the weights, as the Hub spells it: apache-2.0, mit, other, ..."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the data sets that it was trained on."""
    evaluation: str | None = None
    """Record of `ecar evaluate` of this model (.json): its figures go into the card."""
    picture: str | None = None
    """Picture of samples; default: the newest grid of the run, or 16 images drawn now."""
