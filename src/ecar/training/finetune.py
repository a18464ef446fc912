"""Runs that start from the weights of a model (``--init-from``).

What a resumed run needs of the source is kept in ``RUN/init``: the source itself is read once, but where it teaches
(``--distill``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecar.config import ModelConfig
from ecar.data.shards import is_cache
from ecar.files.records import read_json, write_atomically
from ecar.network.model import StageModel
from ecar.pretrained.adapters import Adapter, merged, save_adapter
from ecar.pretrained.build import build_model
from ecar.pretrained.folders import load_model, weights_fingerprint
from ecar.pretrained.transfer import check_fits, transfer
from ecar.tokenizers import Tokenizer, load_tokenizer
from ecar.training.config import TrainConfig, Training
from ecar.training.distill import check_classes, check_distill
from ecar.training.engine.checkpoint import has_checkpoint


@dataclass
class Source:
    """The model that a run starts from.

    Attributes:
        name: as the user gave it.
        fingerprint: of its weights.
        config: its configuration.
        tokenizer: its tokenizer; None where the run has another one.
        weights: its state; None in a resumed run, whose checkpoint has the weights.
        fresh: parameters of the new model that are not the source's, known once it is built.
        notes: what did not fit, in words.
        adapter: LoRA's shape, known once the model is built; None where all weights are trained.
    """

    name: str
    fingerprint: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    weights: dict[str, Tensor] | None = None
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    adapter: Adapter | None = None

    @classmethod
    def find(cls, config: TrainConfig, out: Path) -> Source | None:
        """The source of a run, or what was kept of it where there is a checkpoint; None for a run that has none.

        Raises:
            ValueError: no such model, or damaged.
        """
        if config.start.init_from is None:
            return None
        kept = out / "init"
        if has_checkpoint(out) and (kept / "source.json").exists():
            record = read_json(kept / "source.json", "restore it, or choose another --out")
            tokenizer = load_tokenizer(kept / "tokenizer") if (kept / "tokenizer").exists() else None
            before = ModelConfig.from_json(record["model"])
            fresh, notes = tuple(record["fresh"]), tuple(record["notes"])
            return cls(record["name"], record["weights"], before, tokenizer, None, fresh, notes)
        model, tokenizer = load_model(config.start.init_from)
        fingerprint = weights_fingerprint(config.start.init_from)
        return cls(config.start.init_from, fingerprint, model.config, tokenizer, model.state_dict())

    def with_defaults(self, config: TrainConfig) -> Training:
        """``config`` with everything that the user left open as it is in the source.

        Raises:
            ValueError: another kind of model.
        """
        if config.start.lora_rank is not None:
            import peft  # noqa: F401  (missing? said now, not after the images are read)
        return config.resolve(self.config)

    def adapt(self, model: ModelConfig) -> ModelConfig:
        """The configuration of the new model, with what only the source knows. Where latents and data levels are the
        same, so are the velocities' scales: then the new model starts as exactly the source's function.

        Raises:
            ValueError: nothing of the source fits.
        """
        before = self.config
        check_fits(before, model)
        model = model.replace(context_noise=before.context_noise)
        own, stages = before.sampling, len(model.stages.sides)
        if own is not None and not own.fixed_steps and len(own.steps) == stages:
            if not model.num_classes:
                plain = (1.0,) * stages
                own = dataclasses.replace(own, guidance=plain, guidance_from=())
            model = model.replace(sampling=own)
        levels = [(plan.ends, plan.rho) for plan in (before.stages, model.stages)]
        if levels[0] == levels[1] and model.velocity_std and before.tokenizer in ("", model.tokenizer):
            model = model.replace(velocity_std=before.velocity_std)
        return model

    def check(self, config: Training, model: ModelConfig) -> None:
        """ValueError where nothing of the source fits, or it cannot teach. Cheap."""
        model = self.adapt(model)
        if config.distill.distill is not None:
            check_distill(config.distill, self.config, model)
        if config.start.lora_rank is not None:
            with torch.device("meta"):
                self._make_adapter(config, build_model(model.replace(num_classes=1)))  # the data are not read yet

    def check_classes(self, config: Training, names: tuple[str, ...]) -> None:
        """ValueError where it is to teach classes of the data that it does not know."""
        if config.distill.distill is not None:
            check_classes(config, self.config, names)

    def build(self, config: Training, model: ModelConfig) -> StageModel:
        """The model that is trained, filled from the source; with LoRA matrices where these are asked for. A resumed
        run has nothing to fill: its weights are in the checkpoint."""
        built = build_model(self.adapt(model))
        self._fill(built)
        if config.start.lora_rank is not None:
            self.adapter = self._make_adapter(config, built)
            self.adapter.attach(built)
        return built

    def _make_adapter(self, config: Training, model: StageModel) -> Adapter:
        assert config.start.lora_rank is not None
        return Adapter.make(model, config.start.lora_rank, self.fresh)

    def _fill(self, model: StageModel) -> None:
        if self.weights is None:
            return
        done = transfer(self.weights, self.config, model)
        self.fresh, self.notes, self.weights = done.fresh, done.notes, None
        before = self.config
        if before.tokenizer and model.config.tokenizer != before.tokenizer and before.channels == model.config.channels:
            self.notes += ("loaded, but for latents of another tokenizer: the layers that read and write maps",)

    def keep(self, config: Training, out: Path) -> None:
        """Write ``out/init``."""
        folder = out / "init"
        folder.mkdir(exist_ok=True)
        if self.tokenizer is not None and config.data.tokenizer is None and not is_cache(config.data.data):
            self.tokenizer.save(folder / "tokenizer")
        record = json.dumps({**self.record(), "model": self.config.to_json()}, indent=1) + "\n"
        write_atomically(folder / "source.json", record.encode())

    def record(self) -> dict[str, Any]:
        """For ``training.json`` and the log."""
        return {"name": self.name, "weights": self.fingerprint, "fresh": self.fresh, "notes": self.notes}

    def averaged(self, model: StageModel, weights: dict[str, Tensor]) -> StageModel:
        """A plain copy of a model in training, with ``weights`` in the place of its trained ones."""
        plain = build_model(model.config)
        state = {**model.state_dict(), **weights}
        if self.adapter is not None:
            return merged(plain, self.adapter, state)
        plain.load_state_dict(state)
        return plain

    def save_adapter(self, out: Path, model: ModelConfig, weights: dict[str, Tensor]) -> None:
        """``out/adapter`` from the averages of the trained weights, where there is one."""
        if self.adapter is not None:
            save_adapter(out / "adapter", self.adapter, model, weights, base=self.name, fingerprint=self.fingerprint)

    def announce(self) -> None:
        """Name on stderr what was not loaded."""
        print(f"started from {self.name} ({self.fingerprint})", file=sys.stderr)
        for note in self.notes:
            print(f"  {note}", file=sys.stderr)
