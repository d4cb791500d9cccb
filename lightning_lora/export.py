"""Merged weights written to disk as safetensors, one tensor at a time: no rank ever holds the whole model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .base import LoRALayer
from .errors import LoRAError
from .files import PathLike
from .injection import is_factor, named_state, require_injection
from .sharding import Together, full, is_sharded, writes_files
from .state import refuse_unmergeable

INDEX = "model.safetensors.index.json"
Named = Mapping[str, tuple[torch.Tensor, nn.Module]]


def save_merged(model: nn.Module, folder: PathLike, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write merged weights under the base's names, in the layout of sharded Hugging Face models.

    Collective where the model is sharded: tensors are gathered one by one, and the first rank writes a file whenever
    `max_shard_bytes` are together. The index comes last, so a folder with one is complete.

    Raises:
        LoRAError: the model was not injected, a layer cannot be merged, or writing failed, on any rank.
    """
    require_injection(model, "save_merged")
    refuse_unmergeable(model)
    state = _base_tensors(model)
    files = _plan(state, max_shard_bytes)
    target = Path(folder)
    writing = writes_files(model)
    together = Together(tensor for tensor, _ in state.values())
    together.attempt(f"save_merged: {target}", (lambda: _prepare(target)) if writing else None)
    for file, names in files.items():
        tensors = {}
        for name in names:
            value = _merged(name, *state[name], together)
            if writing:
                tensors[name] = value
            del value
        together.attempt(f"save_merged: {file}", _writer(target / file, tensors) if writing else None)
        together.settle()
    index = _index(files, state)
    together.attempt(f"save_merged: {INDEX}", (lambda: _replace_text(target / INDEX, index)) if writing else None)
    together.settle()


def _base_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, nn.Module]]:
    tensors = {}
    for name, tensor, module in named_state(model):
        if tensor is None:
            raise LoRAError(f"save_merged: {name!r} is no tensor, so safetensors cannot hold it; save a checkpoint.")
        if not is_factor(name, module):
            tensors[name] = (tensor, module)
    return tensors


def _plan(state: Named, most: int) -> dict[str, list[str]]:
    """Names by file, each file below `most` bytes where its tensors allow that; the same on every rank."""
    groups: list[list[str]] = []
    room = 0
    for name, (tensor, _) in state.items():
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= tensor.nbytes
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _merged(name: str, tensor: torch.Tensor, module: nn.Module, together: Together) -> torch.Tensor:
    """A whole tensor on the CPU, in memory of its own, the adapter merged into it."""
    leaf = name.rpartition(".")[2]
    values = [tensor.detach()]
    if isinstance(module, LoRALayer) and leaf in module.adapted_weights() and leaf not in module.lora_kept:
        weights = module.adapted_weights()
        pieces = module.local_pieces(weights, module.lora_A, module.lora_B)

        def merge() -> None:
            values[0] = module.merged_copies(weights, {leaf: pieces[leaf]})[leaf]

        together.attempt(f"save_merged: {name!r}", merge)
    gathered = full(values.pop()).cpu()
    shared = not is_sharded(tensor) and gathered.data_ptr() == tensor.data_ptr()
    return gathered.clone() if shared else gathered.contiguous()


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)


def _writer(path: Path, tensors: dict[str, torch.Tensor]) -> Callable[[], None]:
    def write() -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
        tensors.clear()

    return write


def _index(files: Mapping[str, list[str]], state: Named) -> str:
    total = sum(tensor.nbytes for tensor, _ in state.values())
    places = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True) + "\n"


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
