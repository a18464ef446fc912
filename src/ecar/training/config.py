"""Options of ``ecar train`` and ``ecar tokenizer``: groups, each beside what it configures, and what they have to agree
on. Frozen, validated when made; the text under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from ecar.config import ModelConfig
from ecar.files.options import from_flat
from ecar.training.engine.options import OptimizerOptions, RunOptions, ScaleOptions
from ecar.training.inputs import DataOptions, DistillOptions, StartOptions
from ecar.training.shape import Model, ModelOptions, StageOptions, Stages
from ecar.training.tokenizer_config import TokenizerConfig as TokenizerConfig


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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on images or latents; the same command again resumes."""

    data: DataOptions
    """The data."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """The network."""
    stages: StageOptions = field(default_factory=StageOptions)
    """The stages."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """The optimizer and its learning rate."""
    start: StartOptions = field(default_factory=StartOptions)
    """The model to start from."""
    distill: DistillOptions = field(default_factory=DistillOptions)
    """Distillation."""
    run: RunOptions
    """How long to train, and what to write."""
    scale: ScaleOptions = field(default_factory=ScaleOptions)
    """Memory and processes."""

    def __post_init__(self) -> None:
        start, data = self.start, self.data
        if start.init_from is None:
            if self.distill.distill is not None:
                raise ValueError("--distill needs --init-from, the teacher")
            if data.own_samples:
                raise ValueError(f"--data {data.data} needs --init-from, the model that draws them")
            self.resolve()
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
        parts = {n: getattr(self, n) for n in ("data", "optimizer", "start", "distill", "run", "scale")}
        return Training(model=model, stages=self.stages.resolve(model.architecture.kind, before), **parts)
