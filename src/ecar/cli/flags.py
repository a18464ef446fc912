"""Flags that several verbs have, in groups; ``parse`` checks each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro

from ecar.cli.options import check_dtype, one_or_all, torch_dtype, usable_dtype
from ecar.config import SamplingConfig, check_acceptance

if TYPE_CHECKING:
    from ecar import Pipeline
    from ecar.processes.world import World
    from ecar.refine import BestOf

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
ModelOrDefault = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")]
MARGINS = ("left", "top", "right", "bottom")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How the model is computed."""

    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    compile: bool = False
    """Compile the model first (a minute or more; on CPU it needs g++), then faster: for many images, or a server."""
    cuda_graphs: bool = False
    """Record the head's passes as CUDA graphs and replay them: for few images on a GPU."""
    decoder: str | None = None
    """Another decoder: one trained by ecar tokenizer --freeze-encoder; or, of an AutoencoderKL, folder or Hub id of a
    tiny one (diffusers' AutoencoderTiny, such as TAESD)."""

    def check(self) -> None:
        """ValueError for an unknown dtype; cheap."""
        check_dtype(self.dtype)

    def usable(self) -> Self:
        """The same with float32, and a warning, in place of a bfloat16 that the device only imitates."""
        return replace(self, dtype=usable_dtype(self.dtype, self.device))

    def load(self, model: str) -> Pipeline:
        """The model, ready to draw."""
        from ecar import Pipeline

        return Pipeline.from_pretrained(
            model, device=self.device, dtype=torch_dtype(self.dtype), compile=self.compile,
            cuda_graphs=self.cuda_graphs, decoder=self.decoder, adapter=getattr(self, "adapter", None),
        )  # fmt: skip

    def load_plain(self, model: str) -> Pipeline:
        """The model as it is before it is made faster, whose weights and kernels can be counted."""
        return replace(self, device="cpu", compile=False, cuda_graphs=False).load(model)


@dataclass(frozen=True, kw_only=True)
class AdaptedModelFlags(ModelFlags):
    """How the model is computed, with an adapter or without."""

    adapter: str | None = None
    """Folder of a LoRA adapter of the model (ecar train --lora-rank)."""


@contextmanager
def together(device: str, stopped: str) -> Iterator[tuple[World, str]]:
    """The processes that torchrun started, and the device of this one; a signal ends all of them, which say what they
    were ``stopped`` in."""
    from ecar.devices import resolve_device
    from ecar.processes.signals import StopRequest, exit_when_stopped
    from ecar.processes.world import World

    device = resolve_device(device)
    with exit_when_stopped(), StopRequest(stopped):
        world = World.start(device, tensors=False)
        yield world, world.local_device(device)
        world.stop()


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How the model is sampled."""

    steps: tuple[int, ...] | None = None
    """Solver steps, one number or one per stage (8,8); default: the model's."""
    guidance: tuple[float, ...] | None = None
    """Guidance scale, one number or one per stage (2,1 guides the first of two stages); 1 is off; default: the
    model's."""
    solver: str | None = None
    """euler, heun or ab2; default: the model's."""
    guidance_from: tuple[float, ...] | None = None
    """Time of a stage, in [0, 1), from which guidance acts, one number or one per stage; default: the model's."""

    def settings(self, pipe: Pipeline) -> SamplingConfig:
        """The model's own settings with what was asked for; ValueError where it cannot be sampled so."""
        steps, guidance, start = (one_or_all(v) for v in (self.steps, self.guidance, self.guidance_from))
        return pipe.settings(steps, guidance, self.solver, start)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class CandidateFlags:
    """Choosing among candidates."""

    candidates: int = 1
    """Samples drawn for each image, of which the critic of the model (ecar critic) chooses one: costs as many times as
    much."""
    acceptance: float | None = None
    """Draw candidates one after the other until the critic accepts one, --candidates at most. This is the share of
    samples that it accepts, as 0.5; an image costs about 1 / ACCEPTANCE times as much."""
    critic: str | None = None
    """Critic of the model; default: critic.safetensors in its folder."""

    def check(self) -> None:
        """ValueError for a critic that has nothing to choose from, or an acceptance that is none; cheap."""
        if self.acceptance is not None:
            check_acceptance(self.acceptance, self.candidates)
        if self.critic is not None and self.candidates == 1:
            raise ValueError("`critic` chooses among candidates: give `candidates` 2 or more, or leave it out")

    def best_of(self, pipe: Pipeline) -> BestOf | None:
        """What chooses among candidates of ``pipe``; None where one sample is drawn for an image."""
        if self.candidates == 1:
            return None
        from ecar.refine import BestOf, critic_of

        return BestOf(pipe, critic_of(pipe.name, self.critic), self.candidates, self.acceptance)


@dataclass(frozen=True, kw_only=True)
class EditFlags:
    """What of a picture is drawn anew."""

    mask: str | None = None
    """Picture of the same size: its transparent pixels are drawn or, where it has none, its white ones."""
    box: tuple[int, ...] = ()
    """X,Y,W,H: draw this box, in pixels of the picture."""
    strength: float = 1.0
    """Above 0, at most 1: how much is drawn anew; small values change details only."""
    expand: tuple[int, ...] = ()
    """L,T,R,B: draw margins, in pixels of the picture, which is scaled down for them."""
    upscale: int | None = None
    """2 or 4: enlarge a picture that is so many times smaller than the model's, and draw its finer stages."""

    def check(self) -> None:
        """ValueError for flags that do not go together; cheap."""
        asked = [f"--{name}" for name in ("mask", "box", "expand", "upscale") if getattr(self, name)]
        asked += ["--strength"] * (self.strength != 1 and bool({"--expand", "--upscale"} & {*asked}))
        if len(asked) > 1:
            raise ValueError(f"{asked[0]} and {asked[1]} do not go together: leave one out")
        if len(self.expand) not in (0, len(MARGINS)):
            raise ValueError(f"--expand takes four numbers ({', '.join(MARGINS)}), got {len(self.expand)}")

    @property
    def call(self) -> tuple[str, dict[str, Any]]:
        """Method of ``Pipeline`` that does it, and its arguments."""
        if self.expand:
            return "expand", dict(zip(MARGINS, self.expand, strict=True))
        if self.upscale is not None:
            return "upscale", {"factor": self.upscale}
        return "edit", {"mask": self.mask or self.box or None, "strength": self.strength}

    def settings(self, sampling: SamplingFlags, pipe: Pipeline) -> SamplingConfig:
        """How this is sampled: enlarging is not guided unless that is asked for, as in ``Pipeline.upscale``."""
        if self.upscale is not None and sampling.guidance is None:
            sampling = replace(sampling, guidance=(1.0,))
        return sampling.settings(pipe)
