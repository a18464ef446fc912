"""``fit``: check, plan, and one part after the other; the same call goes on where it was stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecar.data.source import said_before
from ecar.devices import resolve_device
from ecar.files.lock import run_lock
from ecar.files.options import flag, flat, options_of, read_recipe, write_recipe
from ecar.files.records import make_out, read_json, write_atomically
from ecar.fitting import parts
from ecar.fitting.options import FitConfig
from ecar.fitting.parts import Work
from ecar.fitting.plan import Plan, in_words, make_plan
from ecar.fitting.report import write_report
from ecar.fitting.split import Split, make_split
from ecar.processes.signals import StopRequest
from ecar.processes.world import World

RECIPE, PLAN, DONE = "recipe.toml", "plan.json", "done.json"
_OF_THIS_START = ("config", "out", "device")
_AGAIN = "delete the folder, or choose another --out"


def fit(config: FitConfig) -> dict[str, Any]:
    """Make a model and a report of a folder of pictures, or go on with it; returns a summary.

    Raises:
        ValueError: too few pictures, choices that do not fit them, or a folder of another fit.
        Stopped: a signal came while something was trained; its checkpoint is written.
    """
    out = make_out(config.allowance.out, config.photographs.data)
    start, device = time.perf_counter(), resolve_device(config.allowance.device)
    world = World.start(device)
    with ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(run_lock(out))
        stack.enter_context(StopRequest("between steps, what is done stays"))
        config, split, plan = world.from_first(lambda: _begin(config, out, start, world.size), long="plan")
        stack.enter_context(said_before())
        step = plan.seconds["train"] / (plan.choices.max_steps or 1)
        done = _Done(Work(config, split, out, device, step, world), plan)
        done.run_all()
        summary = world.from_first(done.report, long="report")
    world.stop()
    return summary


def _begin(config: FitConfig, out: Path, start: float, processes: int) -> tuple[FitConfig, Split, Plan]:
    """Check the pictures and plan, or read what was planned before."""
    config = _with_recipe(config, out)
    work, allowance = out / "work", config.allowance
    work.mkdir(exist_ok=True)
    _say(f"checking {config.photographs.data}")
    split = make_split(config.photographs, work / "pictures", allowance.seed, allowance.seconds)
    with said_before():
        plan = _plan(config, split, out, start, processes)
    split = split.limited(plan.choices.images, allowance.seed)
    print("\n".join(plan.in_words(split, allowance.seconds / 60)), flush=True)
    return replace(config, choices=plan.choices), split, plan


def _say(text: str) -> None:
    print(f"ecar fit: {text}", file=sys.stderr, flush=True)


class _Done:
    """The parts of a fit, which of them are done, and what they found."""

    def __init__(self, work: Work, plan: Plan) -> None:
        self.work, self.plan = work, plan
        self.path = work.folder / DONE
        world = work.world
        self.found: dict[str, Any] = world.from_first(
            lambda: read_json(self.path, _AGAIN) if self.path.exists() else {}
        )

    def run_all(self) -> None:
        """Those that are planned and not done yet."""
        choices = self.work.choices
        if choices.tokenizer_steps:
            self.part("tokenizer", lambda: parts.fit_tokenizer(self.work), alone=True)
        self.part("encode", lambda: parts.encode(self.work))
        self.part("train", lambda: parts.fit_model(self.work))
        if (choices.scales or 1) > 1:
            self.part("guidance", lambda: parts.guide(self.work))
        self.part("model", lambda: parts.place_model(self.work, self.found.get("guidance", {})), alone=True)
        if choices.samples:
            self.part("evaluate", lambda: parts.judge(self.work))
        if choices.critic_images:
            self.part("critic", lambda: parts.fit_critic(self.work), alone=True)

    def part(self, name: str, work: Callable[[], dict[str, Any]], *, alone: bool = False) -> None:
        """Do a part, and note that it is done; say how long it and the rest take.

        Args:
            name: of the part.
            work: what all processes do together.
            alone: the first one does it, and the others wait.
        """
        if name in self.found:
            return
        world, start = self.work.world, time.perf_counter()
        if name in self.plan.seconds and world.rank == 0:
            names = list(self.plan.seconds)
            rest = sum(self.plan.seconds[one] for one in names[names.index(name) :])
            _say(f"{name} (about {in_words(self.plan.seconds[name])}; {in_words(rest)} to the end)")
        found = world.from_first(work, long=name) if alone else work()
        world.meet(f"{name} done")
        self.found[name] = {"seconds": round(time.perf_counter() - start, 2), **found}
        if world.rank == 0:
            write_atomically(self.path, (json.dumps(self.found, indent=1) + "\n").encode())

    def report(self) -> dict[str, Any]:
        """Write the report; returns the summary."""
        path = write_report(self.work, self.plan, self.found)
        trained = self.found["train"]
        seconds = {name: found["seconds"] for name, found in self.found.items()}
        return {
            "model": str(self.work.out), "report": str(path), "pictures": self.work.split.images,
            "steps": trained["steps"], "held_out_loss": trained["held_out_loss"], "seconds": seconds,
        }  # fmt: skip


def _plan(config: FitConfig, split: Split, out: Path, start: float, processes: int) -> Plan:
    """The plan that was made before, or a new one, written with its recipe."""
    path = out / "work" / PLAN
    if path.exists():
        record = read_json(path, _AGAIN)
        return Plan(config.choices, record["seconds"], record["why"])
    _say("measuring this machine")
    plan = make_plan(config, split, time.perf_counter() - start, processes)
    write_recipe(out / RECIPE, replace(config, choices=plan.choices), ("config",))
    write_atomically(path, (json.dumps({"seconds": plan.seconds, "why": plan.why}, indent=1) + "\n").encode())
    return plan


def _with_recipe(config: FitConfig, out: Path) -> FitConfig:
    """``config`` with what a fit that was begun there has chosen.

    Raises:
        ValueError: it was asked for something else.
    """
    if not (out / "work" / PLAN).exists():
        return config
    before, fields, now = read_recipe(out / RECIPE, _AGAIN), options_of(FitConfig), flat(config)
    own = {name: now.pop(name) for name in _OF_THIS_START}
    for name, value in now.items():
        then = before.get(name)
        then = tuple(then) if isinstance(then, list) else then
        if value not in (then, fields[name].default):
            raise ValueError(f"{out} holds a fit with {flag(name)} {then}, not {value}; choose another --out")
    return FitConfig.of(**{**before, **own})
