"""Distillation: the model learns what a teacher does in more work (``ecar train --init-from TEACHER --distill``).

Both kinds replace the target v_k of the loss, at the same points x_k^t of the path and with the same contexts:

    guidance   v = uncond + s (cond - uncond), of the teacher: one head pass then does what two did (2210.03142)
    steps      with ``steps`` N_k: at t = i / N_k the mean velocity of the teacher over [t, t + 1/N_k], which it crosses
               in one midpoint step, and the model then in one of Euler's; of a teacher that takes Euler steps of
               1/(2 N_k) itself, that of two of them (2202.00512)

Where a stage ends before the data, its previews ask for the velocity at t = 1: that one stays the teacher's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ecar.config import ModelConfig, SamplingConfig
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.pretrained.folders import load_model, weights_fingerprint
from ecar.pretrained.transfer import class_rows, transfer
from ecar.sampling.guidance import guide
from ecar.sampling.loop import check_settings
from ecar.stages import Stage
from ecar.training.config import Training
from ecar.training.inputs import DistillOptions


@dataclass(frozen=True)
class Teacher:
    """A frozen model and how it is followed.

    Attributes:
        model: weights that do not change.
        guidance: scale of its guidance, per stage; 1 is off.
        starts: time of each stage from which guidance acts.
        steps: Euler steps per stage that the student is to take; empty: velocities at any time.
        halving: the teacher takes Euler steps too, twice as many.
    """

    model: StageModel
    guidance: tuple[float, ...]
    starts: tuple[float, ...]
    steps: tuple[int, ...] = ()
    halving: bool = False

    @classmethod
    def load(cls, config: Training, fingerprint: str, source: ModelConfig, student: ModelConfig) -> Teacher:
        """The source of the run as its teacher.

        Args:
            config: options of the run.
            fingerprint: of the weights that it started from.
            source: their configuration.
            student: configuration of the model that is trained.

        Raises:
            ValueError: its weights changed since the run began, another data or stage layout than the
                student's, or nothing to distil.
        """
        assert config.start.init_from is not None
        model = _frozen(config.start.init_from, fingerprint, student)
        scales, starts, steps = check_distill(config.distill, source, student)
        halving = source.sampling is not None and source.sampling.fixed_steps
        return cls(model.to(config.run.device), scales, starts, steps, halving)

    def sampling(self) -> SamplingConfig:
        """Default settings of the student: no guidance, and its own steps."""
        plain, own = (1.0,) * len(self.guidance), self.model.config.sampling
        if self.steps:
            return SamplingConfig(steps=self.steps, guidance=plain, fixed_steps=True)
        steps, solver = (own.steps, own.solver) if own else ((8,) * len(plain), "ab2")
        return SamplingConfig(steps=steps, guidance=plain, solver=solver)

    def null(self, labels: Tensor) -> Tensor:
        """As many labels of the null class."""
        return torch.full_like(labels, self.model.config.null_class)

    def target(self, stage: Stage, x: Tensor, t: Tensor, labels: Tensor, tokens: Tensor, null: Tensor) -> Tensor:
        """What the student's velocity is compared with.

        Args:
            stage: of the plan, which is the student's too.
            x: (B, C, h_k, w_k), points on the path.
            t: (B,); multiples of 1 / N_k where steps are distilled.
            labels: (B,) class ids; the null class gets the unconditional velocity.
            tokens: M_k of the teacher, (B, n_k, D).
            null: the same for the null class.

        Returns:
            (B, C, h_k, w_k), float32.
        """
        v = self.velocity(stage, x, t, labels, tokens, null)
        if not self.steps:
            return v
        half = torch.where(t < 1, 0.5 / self.steps[stage.index], 0.0)
        middle = self.velocity(stage, x + half.view(-1, 1, 1, 1) * v, t + half, labels, tokens, null)
        return (v + middle) / 2 if self.halving else middle

    def velocity(self, stage: Stage, x: Tensor, t: Tensor, labels: Tensor, tokens: Tensor, null: Tensor) -> Tensor:
        """The velocity at (x, t), like ``target``; guided where and when that acts."""
        head, k = self.model.head, stage.index
        v = self.model.velocity(stage, x, t, head.embed_tokens(stage, tokens), labels)
        guided = (t >= self.starts[k] - 1e-6).nonzero().squeeze(1)
        if self.guidance[k] == 1 or len(guided) == 0:
            return v
        embedded = head.embed_tokens(stage, null[guided])
        other = self.model.velocity(stage, x[guided], t[guided], embedded, self.null(labels[guided]))
        return v.index_copy(0, guided, guide(v[guided], other, self.guidance[k]))


def check_distill(
    config: DistillOptions, teacher: ModelConfig, student: ModelConfig
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """The teacher's guidance, the times from which it acts, and the student's steps (or none), per stage. Cheap.

    Raises:
        ValueError: another stage layout than the teacher's, unusable settings, or nothing to distil.
    """
    if teacher.stages != student.stages:
        raise ValueError("--distill needs the teacher's own stages: leave out what sets them")
    stages, own, plain = len(teacher.stages.sides), teacher.sampling, (1.0,) * len(teacher.stages.sides)
    scales, starts = config.guidance
    if not scales:
        scales, starts = (own.guidance, own.guidance_from) if own else (plain, ())
    scales, starts = _per_stage(scales, stages), _per_stage(starts, stages) or (0.0,) * stages
    steps = _per_stage(config.distill_steps, stages)
    if scales == plain and not steps:
        raise ValueError("--distill has nothing to do: the teacher's guidance is 1; give --distill SCALE, or steps")
    if scales != plain and not teacher.num_classes:
        raise ValueError("--distill: guidance needs classes, and the teacher was trained without labels")
    if own is not None and own.fixed_steps and (own.steps != tuple(2 * n for n in steps) or scales != plain):
        raise ValueError(
            f"--distill: the teacher was itself distilled for {own.steps} steps; it can only teach half as many "
            "of each (--distill-steps), without guidance"
        )
    check_settings(SamplingConfig(steps=steps or (1,) * stages, guidance=scales, guidance_from=starts), stages)
    return scales, starts, steps


def check_classes(config: Training, teacher: ModelConfig, names: tuple[str, ...]) -> None:
    """ValueError where the data have classes that the teacher was not trained on, or none that guidance could use."""
    name, (scales, _, _) = config.start.init_from, check_distill(config.distill, teacher, teacher)
    if not names and any(scale != 1 for scale in scales):
        raise ValueError("--distill: guidance needs classes, and the data have no labels")
    student = teacher.replace(num_classes=len(names), class_names=names)
    known = class_rows(teacher, student)
    if missing := [repr(label) for row, label in enumerate(names) if row not in known]:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"--distill: {name} does not have all classes of the data ({len(missing)} of {len(names)}: {some})"
        )


def _frozen(name: str, fingerprint: str, student: ModelConfig) -> StageModel:
    """The function of model ``name`` under the student's numbers of classes; it may have other sizes.

    Raises:
        ValueError: no longer the weights of this fingerprint, of other latents, or without some of the student's
            classes.
    """
    if weights_fingerprint(name) != fingerprint:
        raise ValueError(f"--init-from {name} is no longer the model that this run began with")
    theirs, _ = load_model(name)
    if theirs.config.tokenizer != student.tokenizer or theirs.config.velocity_std != student.velocity_std:
        raise ValueError(f"--distill: these latents are not those that {name} was trained on")
    own = ("width", "heads", "trunk_depth", "head_depth", "velocity_std")
    model = build_model(student.replace(**{key: getattr(theirs.config, key) for key in own}))
    done = transfer(theirs.state_dict(), theirs.config, model)
    if done.fresh:
        fresh = "; ".join(note for note in done.notes if note.startswith("initialised fresh"))
        raise ValueError(f"--distill: {name} does not have all of the student ({fresh})")
    return model.eval().requires_grad_(False)


def grid_times(steps: tuple[int, ...], plan: tuple[Stage, ...], batch: int, generator: torch.Generator) -> Tensor:
    """Times (S, batch), multiples of 1 / N_k for ``steps`` N_k (one for all, or one per stage), each as likely: where
    an Euler step starts, and 1 where previews of the stage need the velocity there."""
    rows = []
    for stage, count in zip(plan, _per_stage(steps, len(plan)), strict=True):
        rows.append(torch.randint(count + (stage.end < 1), (batch,), generator=generator) / count)
    return torch.stack(rows)


def _per_stage(values: tuple, stages: int) -> tuple:  # type: ignore[type-arg]
    """One value stands for every stage."""
    return values * stages if len(values) == 1 else values
