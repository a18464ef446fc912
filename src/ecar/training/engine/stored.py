"""Reading checkpoints in DCP's safetensors format, without a process group."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a sharded checkpoint, gathered, on CPU; no process group is needed."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {name: empty(entry) for name, entry in stored(reader).items()}
    with warnings.catch_warnings():  # DCP warns of what it is asked for here
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def stored(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Sizes and types of all tensors of a checkpoint."""
    entries = reader.read_metadata().state_dict_metadata
    return {n: m for n, m in entries.items() if isinstance(m, TensorStorageMetadata)}


def empty(entry: TensorStorageMetadata) -> Tensor:
    """Room for one of them."""
    return torch.empty(entry.size, dtype=entry.properties.dtype)
