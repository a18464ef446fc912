"""``report.html``: one file that holds its pictures, for whoever wants to see what came of the photographs."""

from __future__ import annotations

import base64
import html
import io
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from ecar.evaluation.reference import read_images
from ecar.files.records import write_atomically
from ecar.fitting.measure import reconstruct
from ecar.fitting.parts import Work
from ecar.fitting.plan import Plan, in_words
from ecar.fitting.split import Split
from ecar.pretrained.folders import load_model
from ecar.sampling.pictures import grid, strip, to_pil
from ecar.sampling.pipeline import Pipeline

_ROWS, _COLUMNS = 8, 8  # of samples
_SHOWN = 8  # reconstructions
_FEW = 32  # samples, where none were drawn before
_STRIP = 6  # samples whose stages are shown
_SHOWN_SIDE = 128  # pixels of a page that small pictures are enlarged to, about
_SMALL = 96  # pixels: below, pictures are kept exact and enlarged


def write_report(work: Work, plan: Plan, found: dict[str, Any]) -> Path:
    """Draw what is missing and write the report; returns its path."""
    pipe = Pipeline.from_pretrained(work.out, device=work.here)
    sections = [
        *_in_short(plan, found), *_samples(work, pipe, found), *_training(work, found), *_tokenizer(work),
        *_copies(work, found), *_figures(found), *_pictures(work.split), *_plan(plan, found), *_commands(work, found),
    ]  # fmt: skip
    page = Template(files("ecar.fitting").joinpath("report.html").read_text())
    title = html.escape(f"{work.out.name}: a model of {work.split.images:,} pictures")
    path = work.out / "report.html"
    write_atomically(path, page.substitute(title=title, sections="\n".join(sections)).encode())
    return path


def _in_short(plan: Plan, found: dict[str, Any]) -> list[str]:
    """What to do next, by how the training ended."""
    trained = found["train"]
    if trained["overfits"]:
        text = "The training ended because the held-out loss had risen: more pictures would help most."
    elif trained["lowest_loss"] < trained["held_out_loss"]:
        text = "The held-out loss was past its lowest at the end: more pictures would help more than more time."
    elif trained["looks"] < 2:
        text = "The training was too short for a second look at the held-out loss: more time would help."
    else:
        text = "The held-out loss was still falling at the end: more time would help (--minutes, in another folder)."
    note = [f"<p>{html.escape(plan.why['note'].capitalize())}.</p>"] if "note" in plan.why else []
    return [f'<div class="note"><p>{html.escape(text)}</p>', *note, "</div>"]


def _samples(work: Work, pipe: Pipeline, found: dict[str, Any]) -> list[str]:
    """Those that were judged, else some that are drawn now; and the stages of a few."""
    count, path = pipe.model.config.num_classes, work.folder / "samples" / "samples.npz"
    if path.exists():
        drawn = np.load(path)["arr_0"][: _ROWS * max(count, _COLUMNS)]
    else:
        labels = [i % count for i in range(_FEW)] if count else None
        out = pipe(labels=labels, seeds=range(_FEW), progress=True)
        drawn = np.stack([np.asarray(image) for image in out.images])
    each = min(_COLUMNS, len(drawn) // max(count, 1))  # of a class: image i has class i modulo their number
    if 1 < count <= _ROWS and each >= 2:
        order, columns = [i * count + label for label in range(count) for i in range(each)], each
        said = f"One row per class: {', '.join(pipe.class_names)}."
    else:
        order, columns = (
            list(range(min(len(drawn), _ROWS * _COLUMNS if count > 1 else _ROWS * _COLUMNS // 2))),
            _COLUMNS,
        )
        shown = ", ".join(pipe.class_names[: len(order)])
        said = f"Classes in turn: {shown}." if count > 1 else "Seeds 0 and following, none chosen."
    some = list(range(min(count, _STRIP))) if count > 1 else [0] * _STRIP
    out = pipe(labels=some if count else None, seeds=range(len(some)), return_stages=True)
    guidance = found.get("guidance", {})
    how = (
        "guidance is distilled into it" if guidance.get("distilled") else f"guidance {_numbers(out.settings.guidance)}"
    )
    text = f"{said} Steps {_numbers(out.settings.steps)}, {how}."
    sheet = grid([Image.fromarray(drawn[i]) for i in order], columns)
    return [
        "<h2>Samples</h2>", f"<p>{html.escape(text)}</p>", _picture(sheet, "samples", work.side),
        "<h2>Stages</h2>", "<p>From the first stage, on a small map, to the last.</p>",
        _picture(strip(out.stages), "stages", work.side),
    ]  # fmt: skip


def _numbers(values: tuple[float, ...]) -> str:
    """One where all are the same, else one per stage."""
    shown = [f"{value:g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else " + ".join(shown)


def _training(work: Work, found: dict[str, Any]) -> list[str]:
    trained = found["train"]
    text = (
        f"{trained['steps']:,} of at most {trained['of']:,} steps. The model is the average after step "
        f"{trained['best_step']:,}, with a held-out loss of {trained['held_out_loss']:.4f}; the lowest was "
        f"{trained['lowest_loss']:.4f}."
    )
    if trained["overfits"]:
        text += " Then it rose by more than 2%, so the training ended: more pictures would help more than more time."
    picture = work.folder / "train" / "loss.png"
    curve = [_file(picture, "loss")] if picture.exists() else ["<p>No curve: matplotlib is not installed.</p>"]
    return ["<h2>Training</h2>", f"<p>{text}</p>", *curve]


def _tokenizer(work: Work) -> list[str]:
    tokenizer = load_model(work.out)[1]
    images = read_images(str(work.split.held_out), "train", work.side, work.side, _SHOWN).images
    back = reconstruct(tokenizer, images, work.here)
    both = [one.float() / 127.5 - 1 for one in (images, back.images)]
    quality = "nothing is lost" if math.isinf(back.psnr) else f"{back.psnr:.1f} dB"
    text = f"Held-out pictures, and below them what the tokenizer gives back: {quality}. Samples get no sharper."
    sheet = grid([image for one in both for image in to_pil(one)], len(images))
    return ["<h2>Reconstructions</h2>", f"<p>{text}</p>", _picture(sheet, "reconstructions", work.side)]


def _copies(work: Work, found: dict[str, Any]) -> list[str]:
    picture = work.folder / "closest.png"
    record = next((v for k, v in _evaluation(found).items() if k.startswith("memorisation")), None)
    if record is None or not picture.exists():
        return []
    verdict = (
        "More samples than held-out pictures are that close: the model copies some training pictures."
        if record["more_than_held_out"]
        else "Held-out pictures are as close as often: no sign of copies."
    )
    ours, theirs = (f"{100 * record[key]:.1f}%" for key in ("share_of_samples", "share_of_held_out"))
    text = (
        f"The samples nearest to training pictures, each beside it. {ours} of {record['samples']} samples and "
        f"{theirs} of {record['held_out']} held-out pictures are within the threshold. {verdict}"
    )
    kind = ' class="note"' if record["more_than_held_out"] else ""
    return ["<h2>Nearest training pictures</h2>", f"<p{kind}>{text}</p>", _file(picture, "nearest")]


def _figures(found: dict[str, Any]) -> list[str]:
    record = _evaluation(found)
    if not record:
        return []
    sides = {"samples": "metrics", "training pictures": "floor: training images",
             "reconstructions": "tokenizer's reconstructions of training images"}  # fmt: skip
    known = {name: record[key] for name, key in sides.items() if key in record}
    measures = [m for m in known["samples"] if m not in ("against", "biased_small_sample") and " std " not in m]
    rows = [["pictures" if m == "num" else m, *(str(known[name].get(m, "")) for name in known)] for m in measures]
    few = record["metrics"].get("biased_small_sample")
    note = (
        [
            "<p>So few pictures bias the Frechet distance: compare KID. Where that is below 0, so few pictures "
            "show no difference.</p>"
        ]
        if few
        else []
    )
    return ["<h2>Figures</h2>", f"<p>Against {record['metrics']['against']} held-out pictures.</p>", *note,
            _table(["", *known], rows)]  # fmt: skip


def _pictures(split: Split) -> list[str]:
    record = split.record
    rows = [
        ["trained on", f"{record['train']:,}" + (f" of {record['of']:,}" if "of" in record else "")],
        ["held out", f"{record['held_out']:,}"],
        ["classes", f"{len(record['classes']):,}"],
        ["median of the short side", f"{record['side']:g} pixels"],
    ]
    for what, kinds in (("left out", record["left_out"]), ("found", record["findings"])):
        for kind, names in kinds.items():
            some = "; ".join(names["names"][:5]) + (" ..." if names["count"] > 5 else "")
            rows.append([f"{what}: {kind}", f"{names['count']:,}: {some}"])
    text = (
        "Broken pictures and second copies are not used. Everything else is: transparent parts lie on white, colours "
        "become sRGB, and of an animation the first picture counts."
    )
    return ["<h2>Pictures</h2>", f"<p>{text}</p>", _table([], rows)]


def _plan(plan: Plan, found: dict[str, Any]) -> list[str]:
    rows = [[name, text] for name, text in plan.why.items()]
    times = [
        [name, in_words(seconds), in_words(found[name]["seconds"]) if name in found else ""]
        for name, seconds in plan.seconds.items()
    ]
    return ["<h2>Plan</h2>", _table([], rows), "<h2>Time</h2>", _table(["part", "planned", "taken"], times)]


def _commands(work: Work, found: dict[str, Any]) -> list[str]:
    """The report is published with the model: it names no place on this machine."""
    lines = [line for part in found.values() for line in part.get("commands", [part.get("command")]) if line]
    again = f"ecar fit --config {work.out / 'recipe.toml'} --data PHOTOS --out ANOTHER_FOLDER"
    draw = f"ecar sample {work.out} --out samples.png"
    text, again = ("\n".join(some).replace(str(work.out), "MODEL") for some in ([*lines, draw], [again]))
    return ["<h2>Commands</h2>", f"<p>MODEL is the folder <code>{html.escape(work.out.name)}</code>. Each part by "
            "itself:</p>", f"<pre>{html.escape(text)}</pre>",
            "<p>All of it once more:</p>", f"<pre>{html.escape(again)}</pre>"]  # fmt: skip


def _evaluation(found: dict[str, Any]) -> dict[str, Any]:
    return dict(found.get("evaluate", {}).get("evaluation", {}))


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + (line(head, "th") if head else "") + "".join(line(row, "td") for row in rows) + "</table>"


def _file(path: Path, name: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'


def _picture(image: Image.Image, name: str, side: int) -> str:
    """Pictures of small ``side`` exactly and enlarged, large ones as JPEG."""
    small, data = side < _SMALL, io.BytesIO()
    image.save(data, "PNG") if small else image.convert("RGB").save(data, "JPEG", quality=90)
    kind = "png" if small else "jpeg"
    style = f' class="small" style="width: {image.width * max(1, _SHOWN_SIDE // side)}px"' if small else ""
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{name}"{style} src="data:image/{kind};base64,{encoded}">'
