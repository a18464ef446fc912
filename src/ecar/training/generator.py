"""The task of ``ecar train``: velocities of all stages, on latents in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecar.data.latents import LatentTable
from ecar.data.order import batch_indices
from ecar.devices import mixed_precision
from ecar.files.options import flat
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.processes.world import Part
from ecar.tokenizers import Tokenizer
from ecar.training.build import rows_per_stage
from ecar.training.config import Training
from ecar.training.curves import plot_losses
from ecar.training.distill import Teacher
from ecar.training.draws import BatchesAhead
from ecar.training.engine.log import by_the_way
from ecar.training.engine.optim import learning_rate, make_optimizers
from ecar.training.engine.task import Losses, Task
from ecar.training.finetune import Source
from ecar.training.loss import Draws, StageLoss
from ecar.training.run import check_same_data, save_samples


class Generator(Task):
    """Trunk and head, or DiT, trained for a ``Trainer``.

    Args:
        config: options.
        model: on its device.
        table: latents in memory.
        tokenizer: decodes the sample grids.
        out: folder of the run.
        source: the model that the run starts from, already in ``model``.
        teacher: whose velocities are learned, where it is not the data's.
    """

    module: StageModel

    def __init__(
        self,
        config: Training,
        model: StageModel,
        table: LatentTable,
        tokenizer: Tokenizer,
        out: Path,
        source: Source | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.module, self.table, self.tokenizer, self.out = config, model, table, tokenizer, out
        self.source, self.loss = source, StageLoss(model, teacher)
        self.rows, self.names = rows_per_stage(config), tuple(f"loss_{k + 1}" for k in range(len(model.plan)))
        self.weights = [float(share > 0) for share in config.stages.stage_share]
        ahead = config.run.device.startswith("cuda")
        self.batches = BatchesAhead(config, table, model.plan, model.config.null_class, ahead=ahead)

    def wrapped(self) -> tuple[nn.Module, list[nn.Module], bool]:
        """A single stage leaves the map's input layer unused."""
        return self.loss, list(self.module.units), len(self.module.plan) == 1

    def optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
        options = self.config.optimizer
        return make_optimizers(self.module, options.optimizer, lr=options.lr), []

    def rate(self, step: int) -> float:
        o = self.config.optimizer
        return learning_rate(step, peak=o.lr, steps=self.config.run.max_steps, decay=o.decay)

    def check(self, record: dict[str, Any]) -> None:
        check_same_data(record, self.module.config, self.table)

    def ready(self) -> None:
        if self.config.run.compile:
            self.module.compile_blocks()

    def begin(self, first: bool) -> dict[str, Any]:
        """As of ``Task``."""
        if not first:
            return {}
        trained, source = sum(p.numel() for p in self.module.parameters() if p.requires_grad), self.source
        if source is not None:
            source.keep(self.config, self.out)
            source.announce()
        parameters = self.module.num_parameters()
        frozen = "" if trained == parameters else f", {trained:,} of them trained"
        print(f"{parameters:,} parameters{frozen}, {len(self.table):,} images, rows {self.rows}")
        return {} if source is None else {"init_from": source.record(), "trained_parameters": trained}

    def about(self) -> dict[str, Any]:
        table = self.table
        counts = {"images_in_data": len(table), "bad_images_skipped": len(table.skipped)}
        parameters = self.module.num_parameters()
        return {"options": flat(self.config), "data": table.about, "parameters": parameters, **counts}

    def draw(self, step: int) -> tuple[Tensor, Tensor, Draws]:
        return self.batches(step)

    def losses(self, module: nn.Module, batch: tuple[Tensor, Tensor, Draws], part: Part) -> Losses:
        """As of ``Task``: the flow-matching loss of every stage on this part of the rows."""
        z, labels, draws = batch
        draws, rows = draws.select(part.where), tuple(r // part.count for r in self.rows)
        with mixed_precision(self.config.run.device, wanted=self.config.scale.dtype == "bf16"):
            losses = module(part.rows(z), part.rows(labels), draws, rows)
        means = torch.stack([loss.mean() for loss in losses])
        weights = torch.tensor(self.weights, device=means.device)
        return Losses((weights * means).sum(), means.detach())

    def line(self, means: list[float]) -> dict[str, float]:
        stage = {name: round(mean, 5) for name, mean in zip(self.names, means, strict=True)}
        return {"loss": round(sum(w * v for w, v in zip(self.weights, stage.values(), strict=True)), 5), **stage}

    def rows_of(self, steps: range) -> dict[int, list[int]]:
        """Rows of the images that are used: without those that were skipped."""
        run, images = self.config.run, len(self.table)
        return {step: batch_indices(images, run.batch_size, run.seed, step - 1).tolist() for step in steps}

    def saving(self, step: int) -> None:  # noqa: ARG002
        with by_the_way("loss.png"):
            plot_losses(self.out, self.names)

    def record(self) -> dict[str, Any]:
        model, table = self.module.config.to_json(), self.table
        return {"train": flat(self.config), "model": model, "images": len(table), "content": table.content}

    def averaged(self, weights: dict[str, Tensor]) -> StageModel:
        """A copy of the model with averaged weights, in evaluation mode."""
        if self.source is not None:
            return self.source.averaged(self.module, weights).to(self.config.run.device).eval()
        model = build_model(self.module.config)
        model.load_state_dict({**self.module.state_dict(), **weights})
        return model.to(self.config.run.device).eval()

    def picture(self, weights: dict[str, Tensor], step: int) -> Path:
        return save_samples(self.averaged(weights), self.tokenizer, self.out, step)

    def __exit__(self, *_: object) -> None:
        self.batches.close()
