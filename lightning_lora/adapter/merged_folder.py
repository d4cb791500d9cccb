"""Merged weights written to disk as safetensors, one tensor at a time: no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..distributed.rank_sync import RankSync, writes_files
from ..distributed.sharding import full_tensor
from ..errors import LoRAError
from ..files.atomic import new_folder
from ..files.model_folder import INDEX_SUFFIX, STEM, index_of, plan_shards
from ..files.paths import PathLike, write_json
from ..files.safetensors import NAMES, SUFFIX, as_bytes, build_header
from ..model.injection import refuse_replaced_layers, require_injection
from ..model.named_state import named_state
from ..model.state_dict import refuse_unmergeable
from ..nn.lora_layer import LoRALayer, is_factor

FILE, INDEX = f"{STEM}{SUFFIX}", f"{STEM}{INDEX_SUFFIX}"
WEIGHTS = (FILE, f"{STEM}-*-of-*{SUFFIX}", INDEX)  # of an earlier export into the same folder
PT = {"format": "pt"}


def save_merged(model: nn.Module, path: PathLike, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write merged weights under the base's names, as a folder in the layout of Hugging Face models.

    The live weights stay as they are, merged or not. Where the model is sharded every rank calls this: each tensor is
    merged on its shards, gathered, written by the first rank and dropped. Any other model is written by each process
    that calls this; under DDP one is enough.

    Args:
        model: an injected model.
        path: the folder, which appears when it is complete. In one that is there already the weights are replaced
            and all else stays.
        max_shard_bytes: what does not fit into one `model.safetensors` of this size goes into several and an index.

    Raises:
        LoRAError: the model was not injected, a layer cannot be merged, or another rank failed. Nothing is written.
        OSError: on the rank whose writing failed.
    """
    require_injection(model, "save_merged")
    refuse_replaced_layers(model, "save_merged")
    refuse_unmergeable(model)
    state = _base_tensors(model)
    sizes = {name: tensor.nbytes for name, (tensor, _) in state.items()}
    files = plan_shards(sizes, max_shard_bytes)
    writes = writes_files(model)
    sync = RankSync(tensor for tensor, _ in state.values())

    def step(what: object, action: Callable[[], object]) -> None:
        """The first rank alone acts, and all know at once whether it could."""
        sync.run(f"save_merged: {what}", action if writes else None)
        sync.raise_on_any_rank()

    with ExitStack() as moves_on_leaving:
        opening = new_folder(path, keep_others=True, replaced=WEIGHTS)
        folder: list[Path] = []
        step(path, lambda: folder.append(moves_on_leaving.enter_context(opening)))
        here = folder[0] if writes else Path()
        for file, names in files.items():
            names.sort(key=lambda name: -state[name][0].dtype.itemsize)  # wide ones first, so that all are aligned
            header = build_header([(name, state[name][0].dtype, tuple(state[name][0].shape)) for name in names], PT)
            step(file, partial(_append, here / file, header))
            for name in names:  # nothing here holds a tensor while the next one is gathered
                step(repr(name), partial(_append_tensor, here / file, _merged(name, *state[name], sync)))
        if len(files) > 1:
            step(INDEX, partial(write_json, here / INDEX, index_of(files, sizes, {})))
        step(path, moves_on_leaving.close)


def _base_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, nn.Module]]:
    tensors = {}
    for name, tensor, module in named_state(model):
        if tensor is None or tensor.dtype not in NAMES:
            found = "no tensor" if tensor is None else f"of {tensor.dtype}"
            raise LoRAError(f"save_merged: {name!r} is {found}, so safetensors cannot hold it; save a checkpoint.")
        if not is_factor(name, module):
            tensors[name] = (tensor, module)
    return tensors


def _merged(name: str, tensor: torch.Tensor, module: nn.Module, sync: RankSync) -> torch.Tensor:
    """A whole tensor on the CPU, the adapter merged into it. Collective where it is sharded."""
    leaf = name.rpartition(".")[2]
    values = [tensor.detach()]
    if isinstance(module, LoRALayer) and leaf in module.adapted_weights() and leaf not in module.lora.records:
        weights = module.adapted_weights()
        blocks = module.local_blocks(weights, module.lora_A, module.lora_B)

        def merge() -> None:
            values[0] = module.merged_copies(weights, {leaf: blocks[leaf]})[leaf]

        sync.run(f"save_merged: {name!r}", merge)
    return full_tensor(values.pop()).cpu()


def _append(path: Path, content: bytes | memoryview) -> None:
    with open(path, "ab") as file:
        file.write(content)


def _append_tensor(path: Path, tensor: torch.Tensor) -> None:
    _append(path, as_bytes(tensor))
