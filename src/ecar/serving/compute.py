"""The engine's numerical part: a chunk of rows in, one stage further out. The algorithm is ``sampling/loop.py``."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ecar.refine import Critic
from ecar.refine.best_of import picks_of
from ecar.sampling.edit import redrawing
from ecar.sampling.known import Known
from ecar.sampling.loop import Rows, VelocityCallback, advance
from ecar.sampling.noise import StageNoise, draw_noise
from ecar.sampling.optimize import padded_count
from ecar.sampling.pictures import from_decoded, to_pil
from ecar.sampling.pipeline import Pipeline
from ecar.serving.config import Limits
from ecar.serving.metrics import Metrics
from ecar.serving.rows import Chunk, EngineError, Failed, Finished, Redraw, Row
from ecar.stages import Stage, data_from_end


class Computer:
    """Advances chunks and sends previews, images and errors to their rows."""

    def __init__(self, pipe: Pipeline, critic: Critic | None, metrics: Metrics, limits: Limits) -> None:
        self.pipe, self.model, self.critic, self.metrics = pipe, pipe.model, critic, metrics
        self.max_batch = limits.max_batch

    def warm_up(self) -> None:
        """One image with the default settings. Compiled: one batch of every size that can come, guided (twice the
        rows) and not, so that no request waits for the compiler."""
        self.pipe(seeds=[0])
        if not self.pipe.fixed_shapes:
            return
        sizes, stages = sorted({padded_count(n + 1) for n in range(self.max_batch)}), len(self.model.plan)
        for count in sizes:
            self.pipe(seeds=range(count), guidance=(1.0,) * stages, batch_size=count)
        if self.model.config.num_classes:
            for count in (n for n in sizes if 2 * n not in sizes):
                self.pipe(seeds=range(count), guidance=(1.5,) * stages, batch_size=count)

    @torch.no_grad()
    def begin(self, rows: list[Row]) -> Chunk | None:
        """New rows before their first stage: their noise is drawn, each from its seed; what they edit is encoded. Rows
        whose picture the tokenizer refuses get their error; None where no others are left."""
        now = time.monotonic()
        for row in rows:
            row.noise = draw_noise([row.seed], self.model.plan, self.model.config.channels)
            self.metrics.wait.observe(now - row.queued)
        rows = [row for row in rows if row.redraw is None or self._encodes(row, row.redraw)]
        if not rows:
            return None
        labels = torch.tensor([row.label for row in rows], device=self.model.device)
        return Chunk(rows, Rows.start(self.model, labels, rows[0].settings))

    @torch.no_grad()
    def advance(self, chunk: Chunk) -> Chunk | None:
        """Do the next stage of the chunk. What is left to do comes back; None where nothing is."""
        start = time.monotonic()
        stage, rows = self.model.plan[chunk.batch.done], chunk.members
        settings, batch, (noise, known) = rows[0].settings, chunk.batch, self._given(stage, rows)
        if self.pipe.fixed_shapes and (missing := padded_count(len(rows)) - len(rows)):
            filled = [*range(len(rows)), *[0] * missing]  # the first row again, for nobody
            batch, noise, known = batch.select(filled), noise.select(filled), known and known.select(filled)
        result = advance(self.model, batch, noise, settings, known=known, on_velocity=self._watch(stage, rows))
        y = result.y[: len(rows)]
        good = self._finite(rows, y)
        end = (stage.index, settings.steps[stage.index])
        last = stage.index == len(self.model.plan) - 1
        if not last and (seen := [i for i in good if end in rows[i].previews]):
            every = range(len(result.y))
            z = result.data(every)[seen] if self.pipe.fixed_shapes else result.data(seen)
            self._show(stage, [rows[i] for i in seen], z)
        if last:
            self._finish([rows[i] for i in good], y[good])
        self._count(stage, len(rows), time.monotonic() - start)
        if last or not good:
            return None
        if batch is not chunk.batch:
            return Chunk([rows[i] for i in good], batch.select(good))
        return chunk.select(good)

    def _encodes(self, row: Row, redraw: Redraw) -> bool:
        """Make what is known of a row that edits; False where its picture is refused."""
        try:
            if redraw.edit is None:
                redraw.edit = redrawing(self.model, self.pipe.tokenizer, redraw.canvas, redraw.strength)
        except ValueError as error:  # a coloured one, and the tokenizer is for grey ones
            self.metrics.dropped.labels("invalid_image").inc()
            row.emit(Failed(EngineError(400, "invalid_image", f"image: {error}")))
            return False
        row.known = redraw.edit.known(row.noise)
        return True

    def _given(self, stage: Stage, rows: list[Row]) -> tuple[StageNoise, Known | None]:
        """What comes into a stage from outside: noise, and what is known where some rows edit pictures."""
        draws = [row.noise[stage.index] for row in rows]
        contexts, fresh = [d.context for d in draws if d.context is not None], [d.fresh for d in draws]
        known = Known.join([row.known[stage.index] if row.known else None for row in rows], fresh)
        return StageNoise(torch.cat(fresh), torch.cat(contexts) if contexts else None), known

    def _watch(self, stage: Stage, rows: list[Row]) -> VelocityCallback | None:
        """Previews inside a stage: after so many steps, what x and its velocity say about the data."""
        steps = rows[0].settings.steps[stage.index]
        due: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            for k, step in row.previews:
                if k == stage.index and step < steps:
                    due.setdefault(step, []).append(index)
        if not due:
            return None

        def on_velocity(stage: Stage, x: Tensor, t: float, v: Tensor) -> None:
            # Heun asks twice for a time, first from the point ahead: that one is as good to look at.
            seen = due.pop(round(t * steps), [])
            seen = [i for i in seen if not rows[i].cancelled]
            if seen:
                z = data_from_end(stage, x[seen] + (1 - t) * v[seen], v[seen])
                self._show(stage, [rows[i] for i in seen], z)

        return on_velocity

    def _show(self, stage: Stage, rows: list[Row], z: Tensor) -> None:
        images = self.pipe.decoder.decode(z)
        good = [i for i, fine in enumerate(torch.isfinite(images).flatten(1).all(1).tolist()) if fine]
        rows, now = [rows[i] for i in good], time.monotonic()
        for row, picture in zip(rows, self._pictures(rows, images[good]), strict=True):
            if row.previewed == 0:
                self.metrics.first_preview.observe(now - row.queued)
            row.show(stage.index, picture)
            self.metrics.previews.inc()

    def _pictures(self, rows: list[Row], images: Tensor) -> list[Image.Image]:
        """Decoded images (B, 3, H, W) of rows, finite; those of edits are laid into their picture."""
        pictures = to_pil(images)
        for index, row in enumerate(rows):
            if row.redraw is not None and row.redraw.edit is not None:
                drawn, side = images[index : index + 1].float(), self.model.config.image_side
                if drawn.shape[2:] != side:  # the preview of a coarse stage
                    drawn = F.interpolate(drawn, side, mode="bicubic")
                pictures[index] = row.redraw.edit.finish(drawn)[0]
        return pictures

    def _finish(self, rows: list[Row], latents: Tensor) -> None:
        if not rows:
            return
        images = self.pipe.decoder.decode(latents)
        good = self._finite(rows, images)
        done = [(rows[i], images[i], rows[i].seed) for i in good if rows[i].group is None]
        done += self._best([rows[i] for i in good if self._completes(rows[i], images[i])])
        now = time.monotonic()
        pictures = self._pictures([d[0] for d in done], torch.stack([d[1] for d in done])) if done else []
        for (row, _, seed), image in zip(done, pictures, strict=True):
            row.emit(Finished(image, seed))
            self.metrics.image_seconds.observe(now - row.queued)
        self.metrics.images.inc(len(done))

    def _completes(self, row: Row, image: Tensor) -> bool:
        """Whether the row is the last of its group's candidates."""
        if row.group is None:
            return False
        row.group.decoded[row.seed] = image
        return row.group.complete

    def _best(self, last: list[Row]) -> list[tuple[Row, Tensor, int]]:
        """Of the groups of these rows the chosen candidates (3, H, W), and their seeds."""
        found, groups = [], [(row, row.group) for row in last if row.group is not None]
        for count in {len(group.seeds) for _, group in groups}:
            some = [(row, group) for row, group in groups if len(group.seeds) == count]
            drawn = torch.stack([group.decoded[seed] for _, group in some for seed in group.seeds])
            assert self.critic is not None  # requests for candidates are refused without one
            labels, seeds = [row.label for row, _ in some], [group.seed for _, group in some]
            picks = picks_of(from_decoded(drawn), self.critic, labels, seeds)
            for number, ((row, group), pick) in enumerate(zip(some, picks, strict=True)):
                found.append((row, drawn[count * number + pick], group.seeds[pick]))
        return found

    def _finite(self, rows: list[Row], values: Tensor) -> list[int]:
        """Rows whose values are finite; the others get their error."""
        fine = torch.isfinite(values).flatten(1).all(1).tolist()
        for row, good in zip(rows, fine, strict=True):
            if not good:
                self.metrics.not_finite.inc()
                self.metrics.dropped.labels("not_finite").inc()
                message = "the image became NaN or infinite; the same request gives the same result"
                row.emit(Failed(EngineError(500, "not_finite", message)))
        return [i for i, good in enumerate(fine) if good]

    def _count(self, stage: Stage, rows: int, seconds: float) -> None:
        name = str(stage.index + 1)
        self.metrics.batch_size.labels(name).observe(rows)
        self.metrics.stage_seconds.labels(name).observe(seconds)
        if self.model.device.type == "cuda":
            self.metrics.memory.set(torch.cuda.memory_allocated(self.model.device))
