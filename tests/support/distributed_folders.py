"""Distributed checkpoints that torch writes in this one process, in the shards that several processes would write."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save


class InParts(torch.Tensor):
    """A tensor that torch.distributed.checkpoint saves in parts, each of the first two dimensions in three."""

    def chunks(self) -> list[ChunkStorageMetadata]:
        cuts = [sorted({0, size, *(size * i // 3 for i in (1, 2) if dim < 2)}) for dim, size in enumerate(self.shape)]
        parts = product(*(pairwise(each) for each in cuts))
        return [
            ChunkStorageMetadata(torch.Size(a for a, _ in part), torch.Size(b - a for a, b in part)) for part in parts
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.chunks()

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.as_subclass(torch.Tensor))
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets, index),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for index, chunk in enumerate(self.chunks())
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        chunk = next(chunk for chunk in self.chunks() if chunk.offsets == index.offset)
        window = (slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.as_subclass(torch.Tensor)[tuple(window)]


def write_sharded(folder: Path, values: Mapping[str, Any]) -> Path:
    """Let torch write nested values, each tensor in parts, in two files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled, )?unavailable or uninitialized")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.6's own writer
        save(_in_parts(values), storage_writer=FileSystemWriter(folder, thread_count=2))
    return folder


def write_as_lightning(folder: Path, checkpoint: Mapping[str, Any], key: str = "state_dict") -> Path:
    """Write a checkpoint as Lightning's strategies do: state dict and optimizers in shards, the rest in meta.pt."""
    rest = dict(checkpoint)
    states = {key: rest.pop("state_dict")}
    states |= {f"optimizer_{i}": state for i, state in enumerate(rest.pop("optimizer_states", []))}
    write_sharded(folder, states)
    torch.save(rest, folder / "meta.pt")
    return folder


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change torch's description of the shards, or replace it by what is returned."""
    description = pickle.loads((folder / ".metadata").read_bytes())
    changed = change(description)
    (folder / ".metadata").write_bytes(pickle.dumps(description if changed is None else changed))


def _in_parts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _in_parts(part) for key, part in value.items()}
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.dim() and value.numel():
        return value.detach().as_subclass(InParts)
    return value
