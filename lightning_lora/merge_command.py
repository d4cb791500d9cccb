"""`lightning-lora merge`: a base and an adapter on disk to merged weights on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .atomic import new_file, new_folder
from .convert import adapter_with_options
from .errors import LoRAError
from .files import PathLike, read_torch_file
from .merge_files import Job, Progress, Shard, new_rows, write_folder_of, write_safetensors, write_torch_file
from .plan import plan
from .verify_files import verify
from .weights import Weights, open_weights


def merge_on_disk(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    lora_alpha: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    check: bool = False,
    strict_base: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda done: None,
) -> list[Path]:
    """Write the base's weights with the adapter merged into them; the output has the form of the base.

    Args:
        base: a folder with safetensors, a safetensors file, a Lightning checkpoint or a state dict.
        adapter: anything that holds one; it must fit the base under one prefix.
        output: appears whole, at the end.
        lora_alpha: for an adapter that does not store it.
        dtype: of the floating point tensors of the result, or None for the base's own.
        max_shard_bytes: how large a file of a folder may be, or None for the base's own sharding.
        check: read the result again and compare it with base and adapter.
        strict_base: whether another base than the adapter's is an error or a warning.
        overwrite: replace what is at `output`.
        progress: is told the number of bytes of each part that is done.

    Returns:
        Files of the base that were left out because they hold weights too.

    Raises:
        LoRAError: something does not fit. Nothing is written.
    """
    weights = open_weights(base)
    _check_output(weights, Path(output), max_shard_bytes)
    _check_place((base, adapter), Path(output), overwrite)
    with _one_thread():
        changes = plan(adapter_with_options(adapter, lora_alpha), weights, strict_base=strict_base)
        return _write(Job(weights, changes, dtype, progress), output, max_shard_bytes, check)


def _write(job: Job, output: PathLike, max_shard_bytes: int | None, check: bool) -> list[Path]:
    if job.base.folder is not None:
        with new_folder(output) as folder:
            left_out = write_folder_of(job, folder, max_shard_bytes)
            if check:
                verify(job, open_weights(folder))
        return left_out
    with new_file(output) as file:
        _write_file(job, file)
        if check:
            verify(job, open_weights(file))
    return []


@contextmanager
def _one_thread() -> Iterator[None]:
    """The disk is the limit; several threads would wait for each other at every small block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_file(job: Job, file: Path) -> None:
    base = job.base
    if base.form == "safetensors":
        header = base.headers[base.path.name]
        write_safetensors(job, Shard(base.path.name, list(header.entries), header.metadata), file)
    elif job.dtype is None:
        write_torch_file(job, file)
    else:
        torch.save(_recast(job, read_torch_file(base.path)), file)


def _recast(job: Job, content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in memory with another dtype, which changes its pickled part; tensors that were one stay one."""
    state: Mapping[str, Any] = content.get("state_dict", content)
    new: dict[Any, torch.Tensor] = {}
    cast = dict(state)
    for name in job.base.places:
        tensor = state[name]
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in new:
            new[key] = new_rows(job, name, tensor.detach(), 0)
        cast[name] = new[key]
        job.progress(tensor.nbytes)
    return {**content, "state_dict": cast} if "state_dict" in content else cast


def _check_output(base: Weights, output: Path, max_shard_bytes: int | None) -> None:
    if base.form == "folder":
        return
    if max_shard_bytes is not None:
        raise LoRAError("merge: max-shard-size is for folders; the base is one file, and so is the output.")
    if (output.suffix == ".safetensors") != (base.form == "safetensors"):
        raise LoRAError(
            f"merge: the output has the form of the base, so {output.name!r} must end in {base.path.suffix!r}."
        )


def _check_place(inputs: tuple[PathLike, ...], output: Path, overwrite: bool) -> None:
    here = Path(os.path.realpath(output))
    for path in map(Path, map(os.path.realpath, inputs)):
        if here.is_relative_to(path) or path.is_relative_to(here):
            raise LoRAError(f"merge: {output} is, or is inside, or holds {path}; write somewhere else.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise LoRAError(f"merge: {output} exists; choose another output, or pass --overwrite to replace it.")
    if output.is_dir() and not any(output.glob("*.safetensors")):
        raise LoRAError(f"merge: {output} holds no safetensors, so it is no earlier result, and is not replaced.")
