"""Checkpoints of any form, in one process: files, and the folders that Lightning's sharding strategies write.

    meta.pt     all but the tensors, written by Lightning
    .metadata   which shards there are, written by torch.distributed.checkpoint
    *.distcp    the shards of the state dict and of the optimizers

DeepSpeed's folders hold an ordinary checkpoint beside its own files, and only that is read.

A strategy's number of processes does not matter. The shards of optimizers are not read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import LoRAError
from ..files.inert_pickle import find_placeholder
from ..files.paths import PathLike, kind_of
from ..files.shards import DESCRIPTION, STATE, Entry, ShardedFolder
from ..files.torch_archive import read_torch_file, refuse_objects
from ..names import META, canonical, names_factor
from .deepspeed_folder import file_beside_engine
from .hyper_parameters import HYPER_PARAMETERS
from .peft_names import are_peft_names

HEADER, SHARDS = "meta.pt", "*.distcp"
OPTIMIZER = "optimizer_"  # Lightning's keys of optimizers begin so, and end in a number
STATES = (STATE, FLAT_STATE) = (STATE, "model")  # FSDP1 calls it by the second name


def is_distributed(folder: Path) -> bool:
    """Return whether a folder is a distributed checkpoint, be it incomplete."""
    return any(kind_of(folder / name) != "nothing" for name in (HEADER, DESCRIPTION))


def read_checkpoint(path: PathLike, *, trusted: bool = False, values: bool = True) -> dict[str, Any]:
    """Read a checkpoint or state dict, from a file or from a folder of shards.

    Args:
        path: of the file or folder.
        trusted: unpickle the objects beside the tensors, which may run any code; see read_torch_file.
        values: whether to read the tensors, or only their shapes and dtypes. Extra state is read in any case.

    Raises:
        LoRAError: there is no such file or folder, or it is damaged.
    """
    path = file_beside_engine(path)
    if kind_of(path) != "folder":
        return read_torch_file(path, "cpu" if values else "meta", trusted=trusted)
    return _read_folder(Path(path), trusted=trusted, values=values)


def read_without_values(path: Path, *, before_torch: bool = False) -> dict[str, Any]:
    """Read a checkpoint file, or a distributed checkpoint with tensors on the meta device.

    Args:
        path: of the file or folder.
        before_torch: torch will read the folder next, and would run code that its description names: refuse such one.

    Raises:
        LoRAError: it is none of these, or damaged.
    """
    if kind_of(path) == "file":
        return read_torch_file(path, mmap=True)
    return {STATE: {}, **_read_folder(path, values=False, before_torch=before_torch)}


def holds_shards_at(path: object) -> bool:
    """Return whether a distributed checkpoint is at a path; False for what is no local path."""
    return isinstance(path, (str, os.PathLike)) and kind_of(path) == "folder" and is_distributed(Path(path))


def is_of_fsdp1(path: Path) -> bool:
    """Return whether FSDPStrategy wrote a folder: it names the model's state otherwise than other strategies do."""
    return holds_shards_at(path) and any(e.keys[0] == FLAT_STATE for e in ShardedFolder(path).entries.values())


def holds_optimizers(path: Path, checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has states of optimizers.

    Args:
        path: of the file or folder.
        checkpoint: what read_without_values returns for it.
    """
    if not holds_shards_at(path):
        return "optimizer_states" in checkpoint
    return any(str(e.keys[0]).startswith("optimizer_") for e in ShardedFolder(path).entries.values())


def read_for_resume(path: Path, *, trusted: bool, optimizers: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a distributed checkpoint, and the states of its optimizers, which are by the names of parameters.

    Args:
        path: of the folder.
        trusted: unpickle the objects beside the tensors, which may run any code.
        optimizers: whether to read these; otherwise an empty list is returned.

    Raises:
        LoRAError: the folder is damaged, or what a Trainer resumes from holds objects.
    """
    checkpoint, shards = read_checkpoint(path, trusted=trusted), ShardedFolder(path)
    names = [name for name, entry in shards.entries.items() if str(entry.keys[0]).startswith(OPTIMIZER)]
    states = shards.nested(shards.read(names if optimizers else []))
    resumed = {key: value for key, value in {**checkpoint, **states}.items() if key != HYPER_PARAMETERS}
    found = find_placeholder(resumed)
    if found is not None:
        raise LoRAError(
            f"{path}: checkpoint{found[0]} is of {found[1]}, and objects are not unpickled, because that may run any "
            "code. If you trust the folder, give the Trainer weights_only=False beside ckpt_path."
        )
    return checkpoint, [states[key] for key in sorted(states, key=lambda key: (len(key), key))]


def read_entries(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Read entries of the model's state from a distributed checkpoint, by their names without wrappers' segments."""
    folder = ShardedFolder(path)
    of_state = {name: e.keys[1] for name, e in folder.entries.items() if e.keys[0] in STATES and len(e.keys) > 1}
    read = folder.nested(folder.read([name for name, key in of_state.items() if canonical(str(key)) in names]))
    return {canonical(str(name)): value for state in read.values() for name, value in state.items()}


def _read_folder(
    path: Path, *, trusted: bool = False, values: bool = True, before_torch: bool = False
) -> dict[str, Any]:
    if not is_distributed(path):
        raise LoRAError(f"{path}: neither a checkpoint file nor a folder with a distributed checkpoint.")
    file = path / HEADER
    has_header = kind_of(file) != "nothing"
    content = read_torch_file(file, trusted=trusted, is_header=True) if has_header else {}
    folder = ShardedFolder(path)
    if before_torch:
        folder.refuse_code()
    content |= _read_shards(folder, values=values)
    if STATE in content and not has_header:
        raise LoRAError(
            f"{file}: is missing, which Lightning writes last: the save was broken off, or the folder was not copied "
            "whole. Take another checkpoint."
        )
    if META in content and STATE not in content:
        content[STATE] = content.pop(FLAT_STATE, {})
    refuse_objects(content, path)
    return content


def _read_shards(folder: ShardedFolder, *, values: bool) -> dict[Any, Any]:
    """Read the model's state, state dicts that hold an adapter, and single values; of the rest what is known of it."""
    entries = folder.entries
    wanted = {entry.keys[0] for entry in entries.values() if _is_read(entry)} if values else STATES
    read = [name for name, entry in entries.items() if entry.keys[0] in wanted and (values or entry.dtype is None)]
    described = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in entries.items()
        if entry.dtype is not None
        and (len(entry.keys) <= 2 or entry.keys[0] in STATES)  # of optimizers nothing is needed
    }
    return folder.nested(described | folder.read(read))


def _is_read(entry: Entry) -> bool:
    first, *below = entry.keys
    if not below or first in STATES:
        return True
    name = below[0] if len(below) == 1 else None
    return isinstance(name, str) and (names_factor(name) or are_peft_names([name]))
