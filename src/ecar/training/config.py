"""Options of ``ecar train`` and ``ecar tokenizer``: groups, each beside what it configures, and what they have to agree
on. Frozen, validated when made; the text under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from ecar.config import ModelConfig
from ecar.files.options import from_flat, option, options_of
from ecar.training.engine.options import OptimizerOptions, RunOptions, ScaleOptions
from ecar.training.inputs import OWN, DataOptions, DistillOptions, StartOptions
from ecar.training.shape import Model, ModelOptions, StageOptions, Stages
from ecar.training.shape import shares as shares
from ecar.training.tokenizer_config import TokenizerConfig as TokenizerConfig

# Properties of the data that --allow-change may name, and what else differs with each.
PROPERTIES = {
    "images": ("content", "velocity_std"),
    "content": ("velocity_std",),
    "class_names": ("content",),
}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What may differ from the run that is resumed."""

    allow_change: tuple[str, ...] = option((), resume="free")
    """Options, or properties of the data, that may differ from those of the run that is resumed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow_change", tuple(key.replace("-", "_") for key in self.allow_change))
        names = {n for n, one in options_of(TrainConfig).items() if one.metadata.get("resume") == "allowed"}
        if unknown := set(self.allow_change) - names - set(PROPERTIES):
            raise ValueError(
                f"--allow-change: {_typed(unknown)} cannot change within a run (start another one with --init-from); "
                f"what can: {_typed(names | set(PROPERTIES))}"
            )

    @property
    def differing(self) -> set[str]:
        """Properties of model and data that may differ with what is allowed."""
        fields = options_of(TrainConfig)
        moved = [fields[n].metadata.get("moves", ()) for n in self.allow_change if n in fields]
        moved += [PROPERTIES.get(n, ()) for n in self.allow_change]
        return set(self.allow_change).union(*moved)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of a run without anything left open."""

    data: DataOptions
    model: Model
    stages: Stages
    optimizer: OptimizerOptions
    start: StartOptions
    distill: DistillOptions
    run: RunOptions
    scale: ScaleOptions
    changes: Changes


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of ``ecar train``."""

    data: DataOptions
    """What is read."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """What is trained."""
    stages: StageOptions = field(default_factory=StageOptions)
    """In which stages."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """By what."""
    start: StartOptions = field(default_factory=StartOptions)
    """From what."""
    distill: DistillOptions = field(default_factory=DistillOptions)
    """Towards what."""
    run: RunOptions
    """How long, and what is written."""
    scale: ScaleOptions = field(default_factory=ScaleOptions)
    """In which memory."""
    changes: Changes = field(default_factory=Changes)
    """As what a run goes on."""

    def __post_init__(self) -> None:
        start, data = self.start, self.data
        if start.init_from is None:
            if self.distill.distill:
                raise ValueError("--distill needs --init-from, the teacher")
            if data.own_samples:
                raise ValueError(f"--data {data.data} needs --init-from, the model that draws them")
            self.resolve()
        if start.own_steps and not data.own_samples:
            raise ValueError(f"--own-steps is for --data {OWN}NUM")
        if self.scale.parallel == "fsdp" and self.optimizer.optimizer == "muon":
            raise ValueError("muon needs whole matrices, which --parallel fsdp cuts; use --optimizer adamw, or ddp")
        if self.scale.parallel == "fsdp" and start.lora_rank is not None:
            raise ValueError("--lora-rank trains few weights, and --parallel fsdp would cut the frozen ones; use ddp")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From options by their names, without groups."""
        return from_flat(cls, options)

    def resolve(self, before: ModelConfig | None = None) -> Training:
        """Everything that was left open as it is in ``before``, the model that the run starts from, else at its
        default.

        Raises:
            ValueError: another kind of model than ``before``, or options that do not fit each other.
        """
        model = self.model.resolve(before)
        parts = {n: getattr(self, n) for n in ("data", "optimizer", "start", "distill", "run", "scale", "changes")}
        return Training(model=model, stages=self.stages.resolve(model.model, before), **parts)


def _typed(names: set[str]) -> str:
    return ", ".join(name.replace("_", "-") for name in sorted(names))
