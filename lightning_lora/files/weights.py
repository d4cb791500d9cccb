"""A model's weights on disk, in any form that the command takes: tensors that lie in files until they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import LoRAError
from ..names import parent_names
from .model_folder import ModelFolder, open_folder
from .paths import PathLike, kind_of
from .safetensors import SUFFIX, TensorFile, open_safetensors
from .torch_archive import compare_check_sums, is_archive, read_torch_file

# Entries that show a quantized weight: bitsandbytes' layers save them beside it, transformers in place of torchao's.
QUANTIZED = re.compile(r"(?P<module>.*)\.(SCB|weight\.absmax|_weight_qdata)")

Form = Literal["folder", "safetensors", "torch"]


@dataclass(frozen=True)
class Weights:
    """A model's weights on disk.

    Attributes:
        path: of the file or folder.
        form: how they are stored.
        tensors: by name; each lies in its file until it is read.
        shards: the safetensors files, by file name; a file of torch.save is none.
        folder: the model folder, if it is one.
        checkpoint: all that is in a file of torch.save; objects are placeholders.
    """

    path: Path
    form: Form
    tensors: Mapping[str, torch.Tensor]
    shards: Mapping[str, TensorFile] = field(default_factory=dict)
    folder: ModelFolder | None = None
    checkpoint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def modules(self) -> set[str]:
        """List every module on the way to a tensor."""
        return {module for name in self.tensors for module in parent_names(name)}

    def holds(self, prefix: str) -> bool:
        """Return whether a segment of a tensor's name begins with a prefix."""
        return any(part.startswith(prefix) for name in self.tensors for part in name.split("."))

    def quantized(self) -> dict[str, str]:
        """Find the modules whose weight is quantized by bitsandbytes or torchao.

        Returns:
            By module, the name of the entry that shows it.
        """
        found = {name: QUANTIZED.fullmatch(name) for name in self.tensors}
        return {match["module"]: name for name, match in found.items() if match}

    def tied(self) -> dict[str, set[str]]:
        """Find the tensors whose values are used under another name too.

        Returns:
            By tensor, the names here that share its values, itself included. Alone, it is tied to what no file holds.
        """
        if self.form == "torch":
            return {name: names for names in self._sharing_bytes() if len(names) > 1 for name in names}
        if self.folder is None or not self.folder.tied_embeddings():
            return {}
        shared: dict[torch.Size, set[str]] = {}
        rows = self.folder.vocabulary()
        for name, tensor in self.tensors.items():
            if tensor.shape[:1] == (rows,) and not self._is_layer_or_norm(name):
                shared.setdefault(tensor.shape, set()).add(name)
        return {name: names for names in shared.values() for name in names}

    def _sharing_bytes(self) -> list[set[str]]:
        groups: list[set[str]] = []
        end = 0  # of the last group's bytes
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].data_ptr()):
            if not tensor.numel():
                continue
            if tensor.data_ptr() >= end:
                groups.append(set())
            groups[-1].add(name)
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = max(end, tensor.data_ptr() + (last + 1) * tensor.itemsize)
        return groups

    def _is_layer_or_norm(self, name: str) -> bool:
        """Return whether a tensor belongs to a numbered layer or to a norm, and so is no embedding and no head."""
        weight = self.tensors.get(f"{name.rpartition('.')[0]}.weight")
        in_layer = any(module.isdigit() for module in name.split(".")[:-2])
        return in_layer or (weight is not None and weight.dim() == 1)

    def compare_check_sums(self) -> None:
        """Raise LoRAError where bytes do not match the file's check sums, if it has any. Reads the whole file."""
        if self.form == "torch" and is_archive(self.path):
            compare_check_sums(self.path)


def open_weights(path: PathLike) -> Weights:
    """Open a model's weights without reading the tensors.

    Args:
        path: a folder with safetensors, a safetensors file, a Lightning checkpoint, or a state dict that torch.save
            wrote.

    Raises:
        LoRAError: the path leads to none of these, or the file is damaged.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "folder":
        folder = open_folder(path)
        tensors = {name: tensor for shard in folder.shards.values() for name, tensor in shard.tensors.items()}
        return Weights(path, "folder", tensors, folder.shards, folder)
    if kind != "file":
        raise LoRAError(f"{path}: there is no such file or folder.")
    if path.suffix == SUFFIX:
        file = open_safetensors(path)
        return Weights(path, "safetensors", file.tensors, {path.name: file})
    checkpoint = read_torch_file(path, mmap=True)
    return Weights(path, "torch", _state(path, checkpoint), checkpoint=checkpoint)


def _state(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, or of the state dict in a checkpoint."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise LoRAError(f"{path}: expected a state dict, found {type(state).__name__}.")
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            continue
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_meta:
            raise LoRAError(f"{path}: {name!r} is sparse, quantized or without values; give a dense tensor.")
        tensors[name] = value.detach()
    return tensors
