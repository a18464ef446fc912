"""``ecar sample``: images from a model, as a grid (.png) or an array (.npz)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ecar.cli.options import (
    check_critic,
    check_dtype,
    one_or_all,
    output_file,
    parse,
    torch_dtype,
    usable_dtype,
)

if TYPE_CHECKING:
    from ecar import Pipeline
    from ecar.sampling.pipeline import Output

MOST_PIXELS = 1 << 28  # of a sheet: more than that takes gigabytes, and few programs open it
MOST_GIF_SIDE = 65_535  # the format has two bytes for it
_TOLD = ("candidates", "acceptance", "dtype", "compile", "cuda_graphs", "decoder")  # as they are


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Generate images from a model."""

    model: Annotated[str, tyro.conf.Positional] = "fashion"
    """Bundled name, folder or Hub id."""
    adapter: str | None = None
    """Folder of a LoRA adapter of the model."""
    out: str = "samples.png"
    """File to write: .png (grid, one row per class) or .npz (arr_0: N x H x W x 3 uint8, labels: N int64)."""
    classes: str = "all"
    """Class names or ids with commas between, `all`, or `none` (no class)."""
    per_class: int = 8
    """Images per class."""
    seed: int = 0
    """Seed of the first image; image i uses seed + i."""
    steps: tuple[int, ...] | None = None
    """Solver steps, one number or one per stage (8,8); default: the model's."""
    guidance: tuple[float, ...] | None = None
    """Guidance scale, one number (all stages but the last) or one per stage; 1 is off; default: the model's."""
    solver: str | None = None
    """euler, heun or ab2; default: the model's."""
    guidance_from: tuple[float, ...] | None = None
    """Time of a stage, in [0, 1), from which guidance acts, one number or one per stage; default: the model's."""
    candidates: int = 1
    """Samples drawn for each image, of which a critic chooses one (ecar critic); costs as many times as much."""
    acceptance: float | None = None
    """Share of samples that the critic accepts, as 0.5: candidates are then drawn one after the other until one is
    accepted, and --candidates at most; costs about 1 / ACCEPTANCE times as much."""
    critic: str | None = None
    """Critic of the model; default: critic.safetensors in its folder."""
    stages: str | None = None
    """Also write a strip of the stages of the first images (.png)."""
    gif: str | None = None
    """Also write the grid growing stage by stage (.gif)."""
    scale: int = 0
    """Enlarge pictures this many times (nearest); 0 chooses 3 for images below 64 pixels, else 1. Not for .npz."""
    batch_size: int = 64
    """Samples computed at once."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    compile: bool = False
    """Compile the model first: a minute (on CPU it needs g++), then faster; for many images."""
    cuda_graphs: bool = False
    """Record the head's passes as CUDA graphs and replay them: for few images on a GPU."""
    decoder: str | None = None
    """Another decoder: one trained by ecar tokenizer --freeze-encoder; or, of an AutoencoderKL, folder or Hub id of a
    tiny one (diffusers' AutoencoderTiny, such as TAESD)."""


@dataclass(frozen=True)
class _Files:
    """Paths to write, each checked."""

    out: Path
    """The images."""
    stages: Path | None
    """The strip of stages, if asked for."""
    gif: Path | None
    """The growing grid, if asked for."""

    @classmethod
    def of(cls, options: SampleOptions) -> _Files:
        """ValueError unless each can be written, and none over another."""
        files = cls(
            output_file(options.out, (".png", ".npz")),
            output_file(options.stages, (".png",), "--stages") if options.stages else None,
            output_file(options.gif, (".gif",), "--gif") if options.gif else None,
        )
        if files.stages is not None and files.stages.resolve() == files.out.resolve():
            raise ValueError(f"--out and --stages are both {files.out}: give each its own name")
        return files


def run(arguments: Sequence[str]) -> None:
    """Parse, check every path, sample, write; prints one JSON object as the last line."""
    options = parse(SampleOptions, arguments, "sample")
    files = _Files.of(options)
    check_critic(options.critic, options.candidates, options.acceptance)
    if options.per_class < 1 or options.scale < 0:
        raise ValueError("--per-class must be at least 1 and --scale at least 0")
    check_dtype(options.dtype)

    from ecar import Pipeline, __version__
    from ecar.pretrained.folders import weights_fingerprint

    options = replace(options, dtype=usable_dtype(options.dtype, options.device))
    pipe = Pipeline.from_pretrained(
        options.model, device=options.device, dtype=torch_dtype(options.dtype), compile=options.compile,
        cuda_graphs=options.cuda_graphs, adapter=options.adapter, decoder=options.decoder, critic=options.critic,
    )  # fmt: skip
    labels = [label for label in _classes(options.classes, pipe) for _ in range(options.per_class)]
    _check_size(options, files, len(labels), pipe.model.config.image_side)
    start = time.perf_counter()
    output = pipe(
        labels,
        seeds=range(options.seed, options.seed + len(labels)),
        steps=one_or_all(options.steps),
        guidance=one_or_all(options.guidance),
        solver=options.solver,
        guidance_from=one_or_all(options.guidance_from),
        candidates=options.candidates,
        acceptance=options.acceptance,
        batch_size=options.batch_size,
        return_stages=bool(files.stages or files.gif),
        progress=True,
    )
    seconds = time.perf_counter() - start
    record = {
        "model": options.model,
        "weights": weights_fingerprint(options.model),
        "adapter": options.adapter,
        "ecar": __version__,
        "images": len(labels),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(labels) / seconds, 2),
        "seed": options.seed,
        "classes": options.classes,
        "per_class": options.per_class,
        "settings": output.settings.to_json(),
        **{name: getattr(options, name) for name in _TOLD},
        "drawn": sum(output.drawn),
        "out": str(files.out),
    }
    _write(output, files, options, json.dumps(record), labelled=pipe.model.config.num_classes > 0)
    print(json.dumps(record))


def _columns(options: SampleOptions, count: int) -> int:
    """Of the sheet: a row per class; one class is about square."""
    from ecar.sampling.pictures import about_square

    return options.per_class if count > options.per_class else about_square(count)


def _scale(options: SampleOptions, width: int) -> int:
    return options.scale or (3 if width < 64 else 1)


def _check_size(options: SampleOptions, files: _Files, count: int, side: tuple[int, int]) -> None:
    """ValueError where a sheet of ``count`` images would be more than programs can open; before they are made."""
    if files.out.suffix.lower() == ".npz" and files.gif is None:
        return
    columns, scale = _columns(options, count), _scale(options, side[1])
    width, height = columns * side[1] * scale, -(-count // columns) * side[0] * scale
    lower = f"lower {'--scale' if scale > 1 else '--per-class'}, or write .npz"
    if width * height > MOST_PIXELS:
        raise ValueError(f"--out would be a sheet of {width:,} x {height:,} pixels, {count} images {scale}x: {lower}")
    if files.gif is not None and max(width, height) > MOST_GIF_SIDE:
        raise ValueError(
            f"--gif would be {width:,} x {height:,} pixels, and GIF has no more than {MOST_GIF_SIDE}: {lower}"
        )


def _write(output: Output, files: _Files, options: SampleOptions, record: str, *, labelled: bool) -> None:
    """Write every file asked for; PNGs carry ``record``, from which they can be made again."""
    import torch

    from ecar.evaluation.samples import Samples, write_samples
    from ecar.sampling.pictures import from_pil, grid, save_gif, save_png, strip

    count, metadata = len(output.images), {"ecar": record}
    columns, scale = _columns(options, count), _scale(options, output.images[0].width)
    if files.out.suffix.lower() == ".npz":
        write_samples(files.out, Samples(from_pil(output.images), torch.tensor(output.labels) if labelled else None))
    else:
        save_png(grid(output.images, columns, scale=scale), files.out, metadata)
    if files.stages is not None:
        first_of_class = range(0, count, options.per_class)
        save_png(strip([[s[i] for i in first_of_class] for s in output.stages], scale=scale), files.stages, metadata)
    if files.gif is not None:
        save_gif(output.stages, files.gif, columns, scale=scale)


def _classes(text: str, pipe: Pipeline) -> list[int | str | None]:
    count = pipe.model.config.num_classes
    if text == "none" or (text == "all" and count == 0):
        return [None]
    if text == "all":
        return list(range(count))
    if not text.strip(" ,"):
        raise ValueError("--classes is empty; give names or ids, all, or none")
    return [*pipe.class_ids(text)]
