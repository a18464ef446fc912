"""LoRA (2106.09685) through ``peft``: small matrices beside the frozen linear layers of a model, as files of their own.

An adapter folder has peft's ``adapter_config.json`` and ``adapter_model.safetensors``, and ``ecar.json``: the
configuration of the model that base and adapter make together (the class table may be another), and which base.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ecar.config import JsonConfig, ModelConfig
from ecar.files.access import check_readable
from ecar.files.tensors import write_tensors
from ecar.network.model import StageModel
from ecar.pretrained.build import build_model
from ecar.pretrained.transfer import transfer

# Attention. ECAR projects q, k and v by one matrix: an adapter of it is one adapter with a shared input matrix.
TARGETS = {"ecar": ("to_qkv", "to_out"), "dit": ("to_q", "to_k", "to_v", "to_out.0")}
_PREFIX, _WEIGHTS, _OWN = "base_model.model.", "adapter_model.safetensors", "ecar.json"


@dataclass(frozen=True, kw_only=True)
class Adapter(JsonConfig):
    """The shape of an adapter.

    Attributes:
        rank: of the two matrices.
        alpha: the product is scaled by alpha / rank.
        targets: last parts of the names of the linear layers that get one.
        whole: parameters that the base does not have (rows of new classes, say): trained and stored as they are.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    whole: tuple[str, ...] = ()

    @classmethod
    def make(cls, model: StageModel, rank: int, whole: tuple[str, ...]) -> Adapter:
        """An adapter of the attention layers of ``model``, whose parameters ``whole`` are trained as they are."""
        own = {name for name, _ in model.named_parameters()}
        kept = tuple(n for n in whole if n in own)
        return cls(rank=rank, alpha=float(rank), targets=TARGETS[model.config.kind], whole=kept)

    def attach(self, model: StageModel) -> Any:
        """Put fresh matrices (their product is zero) into ``model``, in place; everything but them and ``whole`` is
        frozen. Returns peft's ``LoraModel``, which can merge them.

        Raises:
            ValueError: no target is left beside ``whole``.
        """
        from peft import LoraModel

        tuner = LoraModel(model, self.peft_config(), "default")
        for name, parameter in model.named_parameters():
            if name in self.whole:
                parameter.requires_grad_(True)
        return tuner

    def peft_config(self, base: str | None = None) -> Any:
        """The same as peft's ``LoraConfig``."""
        from peft import LoraConfig

        layers = sorted({name.rpartition(".")[0] for name in self.whole})
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.targets),
            exclude_modules=layers or None,
            modules_to_save=layers or None,
            base_model_name_or_path=base,
        )


def merged(model: StageModel, adapter: Adapter, state: dict[str, Tensor]) -> StageModel:
    """A plain model from the state of one with an attached adapter; ``model`` is fresh and is the one returned."""
    tuner = adapter.attach(model)
    model.load_state_dict(state)
    plain: StageModel = tuner.merge_and_unload()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain


def save_adapter(
    folder: Path, adapter: Adapter, model: ModelConfig, weights: dict[str, Tensor], *, base: str, fingerprint: str
) -> None:
    """Write an adapter folder.

    Args:
        folder: where.
        adapter: its shape.
        model: configuration of base and adapter together.
        weights: the trained parameters by their names in the model that the adapter is attached to.
        base: the model it was trained on, as the user named it.
        fingerprint: of that model's weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _WEIGHTS, {_PREFIX + n.replace(".default.", "."): t for n, t in weights.items()})
    adapter.peft_config(base).save_pretrained(str(folder))
    record = {
        "format": 1, "library": "ecar", "base": base, "base_weights": fingerprint, "model": model.to_json(),
        "adapter": adapter.to_json(),
    }  # fmt: skip
    (folder / _OWN).write_text(json.dumps(record, indent=2) + "\n")


def adapter_fingerprint(folder: str | Path) -> str:
    """SHA-256 (16 hex digits) of the weights of an adapter folder."""
    return hashlib.sha256((Path(folder).expanduser() / _WEIGHTS).read_bytes()).hexdigest()[:16]


def apply_adapter(base: StageModel, folder: str | Path, fingerprint: str) -> StageModel:
    """Base and adapter as one plain model in evaluation mode; ``base`` is not changed.

    Args:
        base: float32.
        folder: of ``save_adapter``.
        fingerprint: of the base's weights.

    Raises:
        ValueError: no adapter there, damaged, or of another base; pickles are never loaded.
    """
    path = Path(folder).expanduser()
    for name in (_OWN, _WEIGHTS):
        check_readable(path / name)
    try:
        record = json.loads((path / _OWN).read_text())
        tensors = load_file(path / _WEIGHTS)
        config = ModelConfig.from_json(record["model"])
        adapter, trained_on = Adapter.from_json(record["adapter"]), record["base_weights"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path}: not an adapter of ecar ({error}); it needs {_OWN} and {_WEIGHTS}") from None
    if trained_on != fingerprint:
        raise ValueError(f"{path}: an adapter of {record['base']} (weights {trained_on}), not of weights {fingerprint}")
    model = build_model(config)
    transfer(base.state_dict(), base.config, model)
    tuner = adapter.attach(model)
    state = model.state_dict()
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    given = {next((w for w in wanted if _PREFIX + w.replace(".default.", ".") == n), n): t for n, t in tensors.items()}
    if set(given) != wanted or any(given[n].shape != state[n].shape for n in wanted):
        odd = sorted(set(given) ^ wanted) or sorted(n for n in wanted if given[n].shape != state[n].shape)
        raise ValueError(f"{path / _WEIGHTS}: does not fit its own description: {len(odd)} tensors, such as {odd[0]}")
    model.load_state_dict(given, strict=False)
    plain: StageModel = tuner.merge_and_unload()
    return plain.eval()
