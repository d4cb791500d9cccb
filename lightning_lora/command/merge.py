"""`lightning-lora merge`: what it does to each tensor of a base. All is checked before anything is written."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter, align_to_modules
from ..adapter.fingerprint import compare_fingerprints, fingerprint_entry_at
from ..adapter.save_load import adapter_with_options
from ..config import LoRAConfig
from ..errors import LoRAError
from ..files.atomic import new_file, new_folder
from ..files.paths import PathLike
from ..files.torch_archive import read_torch_file
from ..files.weights import Weights, open_weights
from ..names import A, B
from ..nn.low_rank import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    CONV1D,
    LINEAR,
    MERGEABLE_DTYPES,
    Enabled,
    factor_shapes,
    low_rank_blocks,
    matrix_shape,
)
from .write_merged import (
    Job,
    Progress,
    Shard,
    WeightUpdate,
    new_rows,
    verify_result,
    write_folder_of,
    write_safetensors,
    write_torch_file,
)


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
        updates = plan_updates(adapter_with_options(adapter, lora_alpha), weights, strict_base=strict_base)
        return _write(Job(weights, updates, dtype, progress), output, max_shard_bytes, check)


def _write(job: Job, output: PathLike, max_shard_bytes: int | None, check: bool) -> list[Path]:
    if job.base.folder is not None:
        with new_folder(output) as folder:
            left_out = write_folder_of(job, folder, max_shard_bytes)
            if check:
                verify_result(job, open_weights(folder))
        return left_out
    with new_file(output) as file:
        _write_file(job, file)
        if check:
            verify_result(job, open_weights(file))
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
        write_safetensors(job, Shard(base.path.name, list(header.locations), header.metadata), file)
    elif job.dtype is None:
        write_torch_file(job, file)
    else:
        torch.save(_recast(job, read_torch_file(base.path)), file)


def _recast(job: Job, content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in memory with another dtype, which updates its pickled part; tensors that were one stay one."""
    state: Mapping[str, Any] = content.get("state_dict", content)
    new: dict[Any, torch.Tensor] = {}
    cast = dict(state)
    for name in job.base.locations:
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


INSTEAD = "Load model and adapter in Python and use merge_and_unload instead"


def plan_updates(adapter: Adapter, base: Weights, *, strict_base: bool = True) -> dict[str, WeightUpdate]:
    """Say what happens to which of the base's tensors, by name.

    Raises:
        LoRAError: the adapter does not fit the base, or merged weights cannot express it.
    """
    if any(name.rpartition(".")[2] in (A, B) for name in base.locations):
        raise LoRAError(f"{base.path}: the base holds an adapter itself; give the weights that it was trained on.")
    adapter = align_to_modules(adapter, base.modules(), str(base.path))
    _compare_base(adapter, base, strict_base)
    updates: dict[str, WeightUpdate] = {}
    seen = _seen_orientations(adapter, base)
    for name in adapter.layers():
        updates |= _layer_updates(adapter, name, base, seen)
    for name, value in adapter.tensors.items():
        if name.rpartition(".")[2] not in (A, B):
            updates[name] = _replacement(name, value, base)
    owners = base.other_owners()
    for name in updates:
        owner = owners.get(name)
        if owner:
            raise LoRAError(
                f"{base.path}: {name!r} is also {owner}, so changing it would change that too, and merged weights "
                "cannot express the adapter. Leave the layer out of the adapter, or keep the adapter separate."
            )
    return updates


def _compare_base(adapter: Adapter, base: Weights, strict: bool) -> None:
    """By the names that both have: a file may hold tied weights once, or experts under other names than a model."""
    common = {name: entry for name, entry in adapter.fingerprint.items() if name in base.locations}
    readable = {name: entry for name, entry in common.items() if base.locations[name].in_order}
    try:
        compare_fingerprints({name: fingerprint_entry_at(base.locations[name]) for name in readable}, readable)
    except LoRAError as error:
        if strict:
            raise
        warnings.warn(f"lightning_lora: {error}", stacklevel=3)


def _layer_updates(adapter: Adapter, name: str, base: Weights, seen: Mapping[str, str]) -> dict[str, WeightUpdate]:
    a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"]
    leaves = [leaf for leaf in ("weight", *ATTENTION_WEIGHTS) if f"{name}.{leaf}" in base.locations]
    shapes = {leaf: base.locations[f"{name}.{leaf}"].shape for leaf in leaves}
    if not shapes:
        raise LoRAError(f"{base.path}: {name!r}, which the adapter updates, has no weight there. {INSTEAD}.")
    for leaf in leaves:
        dtype = base.locations[f"{name}.{leaf}"].dtype
        if dtype not in MERGEABLE_DTYPES:
            raise LoRAError(f"{base.path}: {f'{name}.{leaf}'!r} is {dtype}; only floating point weights are merged.")
    kind = adapter.kinds.get(name) or _kind(adapter, name, shapes, base, seen)
    config = adapter.config or LoRAConfig()
    enabled = config.enabled_parts(name)
    if _factor_shapes(kind, shapes, b.shape[1], enabled) != (tuple(a.shape), tuple(b.shape)):
        raise LoRAError(
            f"{base.path}: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a {kind} layer whose weights "
            f"have shape {', '.join(map(str, shapes.values()))}; the adapter belongs to another base."
        )
    blocks = low_rank_blocks(kind, shapes, a, b, enabled)
    return {f"{name}.{leaf}": WeightUpdate(blocks[leaf], adapter.scalings[name]) for leaf in blocks}


def _factor_shapes(kind: str, shapes: Mapping[str, Sequence[int]], rank: int, enabled: Enabled) -> object:
    """The shapes of A and B, or None for weights of another number of dimensions or other names than the kind's."""
    try:
        return factor_shapes(kind, shapes, rank, enabled)
    except (ValueError, LookupError):
        return None


def _kind(
    adapter: Adapter, name: str, shapes: Mapping[str, Sequence[int]], base: Weights, seen: Mapping[str, str]
) -> str:
    """Linear, Conv1D or attention, for an adapter of which only names and shapes are known."""
    if "weight" not in shapes:
        return ATTENTION
    fits = _orientations(adapter, name, shapes["weight"])
    if len(fits) < 2:
        return next(iter(fits), LINEAR)
    said, opposite = (CONV1D, LINEAR) if adapter.fan_in_fan_out else (LINEAR, CONV1D)
    if opposite in seen:
        raise LoRAError(
            f"{base.path}: {name!r} is square, so that its shape does not tell whether it is stored (out, in) or "
            f"(in, out), and the adapter's fan_in_fan_out={adapter.fan_in_fan_out} is contradicted by "
            f"{seen[opposite]!r}. {INSTEAD}."
        )
    return said


def _seen_orientations(adapter: Adapter, base: Weights) -> dict[str, str]:
    """Linear and Conv1D, each with the first layer of unknown kind whose shape says that it is one."""
    seen: dict[str, str] = {}
    for name in adapter.layers():
        location = base.locations.get(f"{name}.weight")
        fits = _orientations(adapter, name, location.shape) if location and name not in adapter.kinds else set()
        if len(fits) == 1:
            seen.setdefault(fits.pop(), name)
    return seen


def _orientations(adapter: Adapter, name: str, shape: Sequence[int]) -> set[str]:
    factors = adapter.tensors[f"{name}.{B}"].shape[0], adapter.tensors[f"{name}.{A}"].shape[1]
    return {kind for kind in (LINEAR, CONV1D) if len(shape) == 2 and matrix_shape(kind, shape) == factors}


def _replacement(name: str, value: Any, base: Weights) -> WeightUpdate:
    """A parameter that was trained whole, or a buffer."""
    location = base.locations.get(name)
    if location is None:
        raise LoRAError(
            f"{base.path}: the adapter comes with {name!r}, trained whole, and the base has no such tensor. {INSTEAD}."
        )
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != location.shape:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise LoRAError(f"{base.path}: {name!r} has shape {location.shape}, in the adapter {found}.")
    if value.is_floating_point() != location.dtype.is_floating_point:
        raise LoRAError(f"{base.path}: {name!r} is {location.dtype}, in the adapter {value.dtype}.")
    if value.is_floating_point() and not math.isfinite(float(value.double().sum())):
        raise LoRAError(f"adapter: {name!r} holds NaN or Inf; it comes from a diverged run or a damaged file.")
    return WeightUpdate(value=value)
