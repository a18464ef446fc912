"""The parts of a fit that take time, each by the library's own verbs: a part that was killed goes on where it was, and
one that is done is not done again."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar.data.encoding import EncodePlan, encode_shards
from ecar.data.source import BadImages, load_source
from ecar.evaluation.config import EvaluationConfig
from ecar.evaluation.extractors import extract, get_extractor
from ecar.evaluation.metrics import kernel_distance
from ecar.evaluation.reference import read_images
from ecar.evaluation.run import evaluate
from ecar.files.options import flag
from ecar.files.records import write_atomically
from ecar.fitting.measure import EXTRACTOR, reconstruct
from ecar.fitting.options import NEW, Choices, FitConfig
from ecar.fitting.plan import JUDGED, LEAST_JUDGED, SCALES
from ecar.fitting.split import Split
from ecar.fitting.tokens import new_sizes
from ecar.fitting.trials import DISTILLED, FRESH_RATE, NO_START
from ecar.pretrained.folders import load_model, save_model, weights_fingerprint
from ecar.processes.world import World
from ecar.refine import make_critic
from ecar.sampling.pictures import from_pil
from ecar.sampling.pipeline import Pipeline
from ecar.tokenizers import load_tokenizer
from ecar.tokenizers.conv import ConvTokenizer
from ecar.training.config import TokenizerConfig, TrainConfig
from ecar.training.engine.log import read_log
from ecar.training.loop import train
from ecar.training.tokenizer import train_tokenizer
from ecar.training.watch import has_risen

TOKENIZER_BATCH = 16
_ALONE = World()
_SAVE_SECONDS = 60.0  # between checkpoints: what a kill costs at most
_WATCHED, _WATCH_SHARE = (32, 256), 0.015  # held-out pictures, from and to, and of those seen: then ten looks
_LOOKS = 6  # the held-out loss may have risen for so many looks in a row
_SHARD = 256  # pictures: what a kill costs, and what one process of several encodes at a time
_AS_GOOD = 1.1  # times the KID of the guided teacher, that a student may have
_CROP = 128  # pixels, of tokenizer training


@dataclass(frozen=True)
class Work:
    """What every part is told.

    Attributes:
        config: options, ``choices`` as resolved.
        split: the pictures.
        out: folder of the model.
        device: as resolved.
        step: seconds of a training step.
        world: the processes that do the parts together.
    """

    config: FitConfig
    split: Split
    out: Path
    device: str
    step: float
    world: World = _ALONE

    @property
    def here(self) -> str:
        """The device of this process."""
        return self.world.local_device(self.device)

    @property
    def folder(self) -> Path:
        """Of everything but the model and its report."""
        return self.out / "work"

    @property
    def choices(self) -> Choices:
        return self.config.choices

    @property
    def tokenizer(self) -> str:
        """The one that is used, known once it is trained."""
        record = self.folder / "tokenizer.json"
        return str(json.loads(record.read_text())["tokenizer"]) if record.exists() else str(self.choices.tokenizer)

    @property
    def judged(self) -> int:
        """Samples of each scale of guidance."""
        return JUDGED if self.config.allowance.seconds >= DISTILLED else LEAST_JUDGED

    @property
    def side(self) -> int:
        assert self.choices.resolution is not None
        return self.choices.resolution

    @property
    def watched(self) -> int:
        """Held-out pictures whose loss is looked at: a look may cost a twentieth of the steps between two."""
        seen = (self.choices.max_steps or 1) * (self.choices.batch_size or 1)
        return max(_WATCHED[0], min(_WATCHED[1], round(_WATCH_SHARE * seen)))

    def every(self, steps: int) -> int:
        """Steps between checkpoints."""
        return max(1, min(steps, round(_SAVE_SECONDS / max(self.step, 1e-9))))


def command(verb: str, values: dict[str, Any]) -> str:
    """A verb with options, as it is typed."""
    words = ["ecar", verb]
    for name, value in values.items():
        if isinstance(value, bool):
            words += [flag(name)] if value else []
        elif isinstance(value, tuple):
            words += [flag(name), *map(str, value)]
        else:
            words += [flag(name), str(value)]
    return shlex.join(words)


def fit_tokenizer(work: Work) -> dict[str, Any]:
    """Train the tokenizer on these pictures; it is taken where it gives held-out ones back better than before."""
    choices, out = work.choices, work.folder / "tokenizer"
    before = None if choices.tokenizer == NEW else load_tokenizer(str(choices.tokenizer))
    started = choices.start not in (None, NO_START)
    values: dict[str, Any] = {
        "data": (str(work.split.train),), "resolution": work.side, "max_steps": choices.tokenizer_steps,
        "batch_size": TOKENIZER_BATCH, "seed": work.config.allowance.seed, "device": work.here, "perceptual": 0.0,
        "save_every": max(20, int(choices.tokenizer_steps or 0) // 10),
        "out": str(out),
    }  # fmt: skip
    if work.side > _CROP:
        values["crop"] = _CROP
    if before is None:
        values |= new_sizes(work.side)
    elif isinstance(before, ConvTokenizer):
        values |= {"init_from": choices.tokenizer, "lr": 5e-4, "freeze_encoder": started}
    trained = train_tokenizer(TokenizerConfig.of(**values))
    images = read_images(str(work.split.held_out), "train", work.side, work.side, 64).images
    after = reconstruct(trained, images, work.here).psnr
    own = reconstruct(before, images, work.here).psnr if before is not None else 0.0
    better = after > own
    record = {"psnr": round(after, 2), "psnr_before": round(own, 2), "command": command("tokenizer", values)}
    chosen = str(out) if better else str(choices.tokenizer)
    write_atomically(work.folder / "tokenizer.json", (json.dumps({"tokenizer": chosen}) + "\n").encode())
    return {**record, "tokenizer": chosen}


def encode(work: Work) -> dict[str, Any]:
    """Latents of both parts of the split."""
    commands, counts = [], []
    for name, data in (("latents", work.split.train), ("held_out_latents", work.split.held_out)):
        first, out = name == "latents", work.folder / name
        out.mkdir(parents=True, exist_ok=True)
        flip, most = first and work.config.photographs.flip, None if first else work.watched
        source = work.tokenizer if first else str(work.folder / "latents" / "tokenizer")  # on the scale of the others
        plan = EncodePlan(side=(work.side, work.side), flip=flip, shard_size=_SHARD)
        values = {
            "data": str(data), "tokenizer": source, "resolution": (work.side,), "flip": flip, "shard_size": _SHARD,
            "out": str(out),
        }  # fmt: skip
        values |= {} if first else {"max_images": most}
        commands.append(command("encode", values))
        record = encode_shards(
            load_source(str(data), max_images=most), load_tokenizer(source), out, plan, bad=BadImages(),
            command=commands[-1], device=work.here, world=work.world,
        )  # fmt: skip
        counts.append(int(record["images"]))
    return {"images": counts[0], "held_out": counts[1], "commands": commands}


def fit_model(work: Work) -> dict[str, Any]:
    """Train until the held-out loss turns, at most ``max_steps``."""
    choices, steps = work.choices, work.choices.max_steps or 0
    values: dict[str, Any] = {
        "data": str(work.folder / "latents"), "val_data": str(work.folder / "held_out_latents"), "patience": _LOOKS,
        "flip": work.config.photographs.flip, "resolution": (work.side,), "preset": choices.preset,
        "stages": choices.stages, "batch_size": choices.batch_size, "max_steps": steps,
        **_rates(steps), "lr": choices.lr or FRESH_RATE, **_ways(work, steps), "out": str(work.folder / "train"),
    }  # fmt: skip
    if choices.start not in (None, NO_START):
        values["init_from"] = choices.start
    train(TrainConfig.of(**values), pictures=False)
    losses = {line["step"]: line["val_loss"] for line in read_log(work.folder / "train") if "val_loss" in line}
    last, lowest = max(losses), min(losses.values())
    best = max(step for step, loss in losses.items() if not has_risen(loss, lowest))
    return {
        "steps": last, "of": steps, "looks": len(losses), "best_step": best, "held_out_loss": losses[best],
        "lowest_loss": lowest,
        "overfits": last < steps, "command": command("train", values),
    }  # fmt: skip


def _rates(steps: int) -> dict[str, Any]:
    """Optimizer and average for so many steps."""
    return {"optimizer": "muon", "ema": 0.99 if steps >= 500 else 0.9}


def _ways(work: Work, steps: int) -> dict[str, Any]:
    """How a training of so many steps runs."""
    return {
        "compile": bool(work.choices.compile), "device": work.device, "seed": work.config.allowance.seed,
        "save_every": work.every(steps),
    }  # fmt: skip


def guide(work: Work) -> dict[str, Any]:
    """Choose a scale of guidance by its samples; distil it where there is time, and keep the student where its samples
    are about as good."""
    teacher, student, steps = work.folder / "train" / "final", work.folder / "student", work.choices.student_steps or 0
    found: dict[float, float] = work.world.from_first(lambda: _Judge(work).scales(teacher), long="scales")
    scale = min(found, key=lambda one: found[one])
    record: dict[str, Any] = {"kid_by_scale": {str(one): round(kid, 3) for one, kid in found.items()}, "scale": scale}
    if scale == 1 or not steps:
        return {**record, "distilled": False}
    values: dict[str, Any] = {
        "init_from": str(teacher), "distill": (f"{scale:g}",),
        "data": str(work.folder / "latents"), "flip": work.config.photographs.flip,
        "batch_size": work.choices.batch_size, "max_steps": steps, **_rates(steps), "lr": 1e-3, **_ways(work, steps),
        "out": str(student),
    }  # fmt: skip
    train(TrainConfig.of(**values), pictures=False)

    def kid() -> float:
        return _Judge(work).kid(Pipeline.from_pretrained(student / "final", device=work.here), 1.0)

    own = work.world.from_first(kid, long="student")
    kept = own <= _AS_GOOD * found[scale]
    return {**record, "distilled": kept, "kid_of_student": round(own, 3), "command": command("train", values)}


class _Judge:
    """KID (x 1000) of a few samples against training pictures: it chooses, and so judges nothing that is reported."""

    def __init__(self, work: Work) -> None:
        self.extractor, self.work = get_extractor(EXTRACTOR, device=work.here), work
        self.seed = work.config.allowance.seed + 2**31  # other seeds than those of the evaluation
        real = read_images(str(work.split.train), "train", work.side, work.side, 2 * JUDGED).images
        self.real = extract(self.extractor, real)[0]

    def scales(self, model: Path) -> dict[float, float]:
        """KID by scale of guidance."""
        pipe = Pipeline.from_pretrained(model, device=self.work.here)
        return {scale: self.kid(pipe, scale) for scale in SCALES[: self.work.choices.scales]}

    def kid(self, pipe: Pipeline, scale: float) -> float:
        """Of ``work.judged`` samples."""
        labels = [i % pipe.model.config.num_classes for i in range(self.work.judged)]
        seeds = range(self.seed, self.seed + len(labels))
        images = from_pil(pipe(labels=labels, seeds=seeds, guidance=scale, progress=True).images)
        return 1000 * kernel_distance(self.real, extract(self.extractor, images)[0])[0]


def place_model(work: Work, guidance: dict[str, Any]) -> dict[str, Any]:
    """The model folder: the student, or what was trained, with the guidance that was chosen or planned."""
    source = work.folder / ("student" if guidance.get("distilled") else "train") / "final"
    model, tokenizer = load_model(source)
    own, scale = model.config.sampling, float(guidance.get("scale", work.choices.guidance or 1.0))
    if own is not None and not guidance.get("distilled"):
        own = dataclasses.replace(own, guidance=(scale,) * len(own.guidance), guidance_from=())
        model.config = model.config.replace(sampling=own)
    save_model(work.out, model, tokenizer)
    shutil.copyfile(source / "training.json", work.out / "training.json")
    return {"weights": weights_fingerprint(work.out), "parameters": model.num_parameters()}


def judge(work: Work) -> dict[str, Any]:
    """Samples against held-out pictures, and whether they copy training pictures."""
    real = work.world.from_first(lambda: str(work.split.judged_by))
    values: dict[str, Any] = {
        "data": real, "split": "train", "train_data": str(work.split.train),
        "num": work.choices.samples, "allow_small": True, "seed": work.config.allowance.seed,
        "cache": str(work.folder / "features"), "batch_size": 32,
    }  # fmt: skip
    pipe = Pipeline.from_pretrained(work.out, device=work.here)
    record = evaluate(
        pipe, EvaluationConfig(**values), about={"weights": weights_fingerprint(work.out)},
        folder=work.folder / "samples", picture=work.folder / "closest.png", device=work.here, world=work.world,
    )  # fmt: skip
    if work.world.rank == 0:
        write_atomically(work.folder / "evaluation.json", (json.dumps(record, indent=2) + "\n").encode())
    typed = command("evaluate", {"model": str(work.out), **values, "out": str(work.out / "evaluation.json")})
    return {"evaluation": record, "command": typed}


def fit_critic(work: Work) -> dict[str, Any]:
    """What chooses among candidates, beside the model."""
    path, data, count = work.out / "critic.safetensors", str(work.split.train), int(work.choices.critic_images or 0)
    values = {"data": data, "num": count, "batch_size": 32, "out": str(path)}
    pipe = Pipeline.from_pretrained(work.out, device=work.here)
    critic = make_critic(pipe, data, num=count, batch_size=32)
    critic.save(path)
    typed = command("critic", values).replace("ecar critic", f"ecar critic {shlex.quote(str(work.out))}", 1)
    return {"accuracy": critic.about["accuracy"], "command": typed}
