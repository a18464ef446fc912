"""Files of ``ecar sample`` and ``ecar edit``: a sheet or an array of images, a strip of stages, a GIF."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecar.cli.options import output_file

if TYPE_CHECKING:
    from ecar.sampling.pipeline import Output

MOST_PIXELS = 1 << 28  # of a sheet: more than that takes gigabytes, and few programs open it
MOST_GIF_SIDE = 65_535  # the format has two bytes for it
_STRIP = 10  # classes


@dataclass(frozen=True, kw_only=True)
class PictureFlags:
    """Files to write."""

    out: str = "samples.png"
    """File to write: .png (grid, one row per class) or .npz (arr_0: N x H x W x 3 uint8, labels: N int64)."""
    stages: str | None = None
    """Also write a strip of the stages of the first image of each class, of ten classes at most (.png)."""
    gif: str | None = None
    """Also write the grid growing stage by stage (.gif)."""
    scale: int = 0
    """Enlarge pictures this many times (nearest); 0 chooses 3 for images below 64 pixels, else 1. Not for .npz."""

    @property
    def arrays(self) -> bool:
        """Whether --out is a file of arrays."""
        return Path(self.out).suffix.lower() == ".npz"

    @property
    def one_array(self) -> bool:
        """Whether there is nothing else to write, so that images may come from several processes."""
        return self.arrays and not self.stages and not self.gif

    def check(self) -> None:
        """ValueError unless the values are usable."""
        _check_files(self, ".png", ".npz")
        if self.scale < 0:
            raise ValueError("--scale must be at least 0")

    def check_size(self, count: int, per_class: int, side: tuple[int, int]) -> None:
        """ValueError where a sheet of ``count`` images of ``side`` would be more than programs can open."""
        if self.arrays and not self.gif:
            return
        columns, scale = _columns(count, per_class), self._scale(side[1])
        width, height = columns * side[1] * scale, -(-count // columns) * side[0] * scale
        lower = f"lower {'--scale' if scale > 1 else '--per-class'}, or write .npz"
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"--out would be a sheet of {width:,} x {height:,} pixels, {count} images {scale}x: {lower}"
            )
        if self.gif and max(width, height) > MOST_GIF_SIDE:
            raise ValueError(
                f"--gif would be {width:,} x {height:,} pixels, and GIF has no more than {MOST_GIF_SIDE}: {lower}"
            )

    def write(self, output: Output, per_class: int, record: str, *, labelled: bool) -> None:
        """Write every file asked for; PNGs carry ``record``, from which they can be made again."""
        import torch

        from ecar.evaluation.samples import Samples, write_samples
        from ecar.sampling.pictures import from_pil, grid, save_gif, save_png, strip

        count, metadata, out = len(output.images), {"ecar": record}, Path(self.out).expanduser()
        columns, scale = _columns(count, per_class), self._scale(output.images[0].width)
        if self.arrays:
            write_samples(out, Samples(from_pil(output.images), torch.tensor(output.labels) if labelled else None))
        else:
            save_png(grid(output.images, columns, scale=scale), out, metadata)
        if self.stages:
            rows = [[s[i] for i in range(0, count, per_class)[:_STRIP]] for s in output.stages]
            save_png(strip(rows, scale=scale), Path(self.stages).expanduser(), metadata)
        if self.gif:
            save_gif(output.stages, Path(self.gif).expanduser(), columns, scale=scale)

    def _scale(self, width: int) -> int:
        return self.scale or (3 if width < 64 else 1)


def _columns(count: int, per_class: int) -> int:
    """Of the sheet: a row per class; one class, or one image of each, is about square."""
    from ecar.sampling.pictures import about_square

    return per_class if count > per_class > 1 else about_square(count)


@dataclass(frozen=True, kw_only=True)
class EditedFlags:
    """Files to write."""

    out: str = "edited.png"
    """File to write (.png)."""
    stages: str | None = None
    """Also write a strip of the stages (.png)."""
    gif: str | None = None
    """Also write the results growing stage by stage (.gif)."""

    @property
    def of_stages(self) -> bool:
        """Whether the stages are shown too."""
        return bool(self.stages or self.gif)

    def check(self) -> None:
        """ValueError unless the values are usable."""
        _check_files(self, ".png")

    def write(self, output: Output, model: str, inputs: dict[str, str | None], asked: dict[str, object]) -> str:
        """Write every file asked for. PNGs carry the record that is returned (JSON): the results can be made again.

        Args:
            output: results and stages.
            model: which drew them.
            inputs: files that were read, by what they are; their SHA-256 goes into the record.
            asked: what else decides the results.
        """
        from ecar import __version__
        from ecar.pretrained.folders import weights_fingerprint
        from ecar.sampling.pictures import grid, save_gif, save_png, strip

        record: dict[str, object] = {
            "model": model,
            "weights": weights_fingerprint(model),
            "ecar": __version__,
            **inputs,
        }
        record |= {f"{name}_sha256": _digest(file) for name, file in inputs.items()}
        record |= {**asked, **asdict(self), "settings": output.settings.to_json()}
        text = json.dumps(record)
        save_png(grid(output.images), Path(self.out).expanduser(), {"ecar": text})
        if self.stages:
            save_png(strip(output.stages), Path(self.stages).expanduser(), {"ecar": text})
        if self.gif:
            save_gif(output.stages, Path(self.gif).expanduser(), None)
        return text


def _check_files(flags: PictureFlags | EditedFlags, *suffixes: str) -> None:
    """ValueError unless each file can be written, and none over another."""
    out = output_file(flags.out, suffixes)
    if flags.stages and output_file(flags.stages, (".png",), "--stages").resolve() == out.resolve():
        raise ValueError(f"--out and --stages are both {out}: give each its own name")
    if flags.gif:
        output_file(flags.gif, (".gif",), "--gif")


def _digest(file: str | None) -> str | None:
    return None if file is None else hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
