"""Write merged weights part by part."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ..errors import LoRAError
from ..files.inert_pickle import find_placeholder
from ..files.model_folder import CONFIG, index_of, side_files
from ..files.paths import write_json
from ..files.safetensors import Header, as_bytes, build_header, read_rows, write_values
from ..files.torch_archive import read_torch_file, set_check_sums
from ..files.weights import Weights
from ..nn.exact_merge import chunk_elements, merged_weight
from ..nn.low_rank import HALF, MERGEABLE_DTYPES, LowRankBlock, crop


@dataclass(frozen=True)
class WeightUpdate:
    """The update of one tensor: first a replacement, then what a merge does.

    Attributes:
        value: replaces the tensor, or None.
        blocks: what is merged. In a stack (E, m, n) they lie as if its matrices were below each other.
        scaling: s.
        stacked: the tensor is a stack.
    """

    blocks: Sequence[LowRankBlock] = ()
    scaling: float = 0.0
    value: torch.Tensor | None = None
    stacked: bool = False

    def applied(self, rows: torch.Tensor, first: int, dtype: torch.dtype, cost: list[float]) -> torch.Tensor:
        """Return the new values of some rows in a dtype, rounded once.

        Args:
            rows: the old values.
            first: the number of the first row.
            dtype: of the result.
            cost: as of merged_weight.
        """
        if self.value is not None:
            wide = torch.promote_types(rows.dtype, dtype)  # the base's dtype alone would round what the result can hold
            rows = (self.value[first : first + len(rows)] if rows.dim() else self.value).detach().to(wide)
        each = rows.shape[1] if self.stacked else 1
        matrix = rows.reshape(-1, rows.shape[-1]) if self.stacked else rows
        blocks = crop(self.blocks, slice(first * each, first * each + len(matrix))) if self.blocks else []
        if not blocks:
            return rows.to(dtype)
        counted = cost if dtype in HALF else None
        return merged_weight(matrix, blocks, self.scaling, dtype=dtype, cost=counted).view(rows.shape)

    def is_equal(self, other: WeightUpdate) -> bool:
        """Return whether another update changes a tensor in the same way."""
        return (
            (self.scaling, self.stacked) == (other.scaling, other.stacked)
            and _are_equal([self.value], [other.value])
            and [(block.row, block.col) for block in self.blocks] == [(block.row, block.col) for block in other.blocks]
            and all(_are_equal(one[2:6], two[2:6]) for one, two in zip(self.blocks, other.blocks, strict=True))
        )


def _are_equal(tensors: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]) -> bool:
    return all(
        one is two or (one is not None and two is not None and torch.equal(one, two))
        for one, two in zip(tensors, others, strict=True)
    )


@dataclass(frozen=True)
class Job:
    """One merge to write.

    Attributes:
        base: the weights.
        updates: by the name of a tensor.
        dtype: of the result, or None for that of the base.
        progress: called with the number of bytes of each part that is done.
        cost: what rounding to 16 bits costs, see merge_weight_.
    """

    base: Weights
    updates: Mapping[str, WeightUpdate]
    dtype: torch.dtype | None
    progress: Callable[[int], object] = lambda size: None
    cost: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def result_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor of the result. Tensors that are not floating point keep theirs."""
        dtype = self.base.locations[name].dtype
        return self.dtype if self.dtype is not None and dtype in MERGEABLE_DTYPES else dtype

    def result_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor of the result: what was trained whole may have another than the base's."""
        value = self.updates[name].value if name in self.updates else None
        return self.base.locations[name].shape if value is None else tuple(value.shape)

    def result_nbytes(self, name: str) -> int:
        """Return the size of one tensor of the result, in bytes."""
        return math.prod(self.result_shape(name)) * self.result_dtype(name).itemsize

    def keeps_layout(self) -> bool:
        """Return whether all tensors of the result have the base's dtypes and shapes."""
        shapes = {name: location.shape for name, location in self.base.locations.items()}
        return self.dtype is None and all(self.result_shape(name) == shape for name, shape in shapes.items())


def write_folder_of(job: Job, target: Path) -> list[Path]:
    """Write a model folder: shards, index, config and all files beside them.

    Args:
        job: the merge. Its base is a folder.
        target: an empty folder.

    Returns:
        The files that were left out because they hold unmerged weights.
    """
    folder = job.base.folder
    assert folder is not None
    copied, left_out = side_files(folder)
    for file, header in folder.shards.items():
        _write_safetensors(job, header, target / file)
    for path in copied:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.path / path, target / path)
    if job.dtype is not None and folder.config:
        write_json(target / CONFIG, _with_dtype(folder.config, job.dtype))
    if folder.index_name and job.dtype is None:
        shutil.copyfile(folder.path / folder.index_name, target / folder.index_name)
    elif folder.index_name:
        files = {file: list(header.locations) for file, header in folder.shards.items()}
        sizes = {file: {name: job.result_nbytes(name) for name in names} for file, names in files.items()}
        write_json(target / folder.index_name, index_of(sizes, folder.index))
    return left_out


def write_file_of(job: Job, target: Path) -> None:
    """Write a file in the form of the base's: safetensors, a Lightning checkpoint or a state dict."""
    base = job.base
    if base.form == "safetensors":
        header = base.headers[base.path.name]
        _write_safetensors(job, header, target)
    elif job.keeps_layout():
        _write_torch_file(job, target)
    else:
        content = read_torch_file(base.path)
        _refuse_objects(base.path, content)
        torch.save(_recast(job, content), target)


def new_rows(job: Job, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
    """Return the new values of some rows of a tensor.

    Raises:
        LoRAError: a finite value became NaN or infinite.
    """
    dtype, update = job.result_dtype(name), job.updates.get(name)
    if update is None and dtype == rows.dtype:
        return rows
    try:
        new = update.applied(rows, first, dtype, job.cost) if update else rows.to(dtype)
    except LoRAError as error:
        raise LoRAError(f"merge: {name!r}: {error}. Nothing was written.") from error
    if dtype != rows.dtype and not torch.isfinite(new).all() and torch.isfinite(rows).all():
        raise LoRAError(f"merge: {name!r} does not fit into {dtype}: it holds values beyond its range.")
    return new


def _whole(job: Job, name: str) -> torch.Tensor:
    """Return a tensor that replaces one of another shape, in its dtype."""
    return new_rows(job, name, cast(torch.Tensor, job.updates[name].value), 0)


def _write_safetensors(job: Job, before: Header, target: Path) -> None:
    """Write the tensors of one of the base's files. Reuse its header where they keep dtypes and shapes."""
    names = list(before.locations)
    if job.keeps_layout():
        header = before.raw
    else:
        names = sorted(names, key=lambda name: -job.result_dtype(name).itemsize)  # so that all are aligned
        shapes = [(name, job.result_dtype(name), job.result_shape(name)) for name in names]
        header = build_header(shapes, before.metadata)
    write_values(target, header, _values(job, names))


def _values(job: Job, names: Sequence[str]) -> Iterator[torch.Tensor]:
    """Yield tensors of the result, one after the other, some rows at a time."""
    for file, in_file in groupby(names, key=lambda name: job.base.locations[name].file):
        with open(file, "rb") as source:
            for name in in_file:
                yield from _new_values(job, name, source)


def _new_values(job: Job, name: str, source: BinaryIO) -> Iterator[torch.Tensor]:
    """Yield a tensor of the result, some rows at a time, out of the file that holds it in the base."""
    location = job.base.locations[name]
    if job.result_shape(name) != location.shape:
        yield _whole(job, name)
        job.progress(location.nbytes)
        return
    block = chunk_elements(torch.device("cpu"))
    for first, count in location.chunks(block):  # merge rounds by block: whole blocks give the bits of merge in memory
        rows = read_rows(source, location, first, count)
        yield new_rows(job, name, rows, first)
        job.progress(rows.nbytes)


def _write_torch_file(job: Job, target: Path) -> None:
    """Copy a file that torch.save wrote and put the merged weights into the copy."""
    job.base.compare_check_sums()  # now: a new check sum would hide damage
    shutil.copyfile(job.base.path, target)
    locations = [job.base.locations[name] for name in job.updates]
    with open(job.base.path, "rb") as source, open(target, "r+b") as out:
        for name, location in job.base.locations.items():
            if name not in job.updates:
                job.progress(location.nbytes)
                continue
            out.seek(location.start)
            for value in _new_values(job, name, source):
                out.write(as_bytes(value))
    set_check_sums(target, locations)


def _refuse_objects(path: Path, content: dict[str, Any]) -> None:
    """Raise LoRAError where a file holds objects: they are not unpickled, and so cannot be written again."""
    found = find_placeholder(content)
    if found is not None:
        raise LoRAError(
            f"merge: {path}: checkpoint{found[0]} is of {found[1]}, and objects are not unpickled, so that the file "
            "can be copied and changed but not written anew with another dtype or shape. Leave --dtype out, or give "
            "the state dict by itself as --base."
        )


def _recast(job: Job, content: dict[str, Any]) -> dict[str, Any]:
    """Merge in memory, into another dtype or shape. Tensors that share memory share it in the result too."""
    state: Mapping[str, Any] = content.get("state_dict", content)
    new: dict[Any, torch.Tensor] = {}
    changed = dict(state)
    for name in job.base.locations:
        tensor = state[name]
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in new:
            same_shape = job.result_shape(name) == tuple(tensor.shape)
            made = new_rows(job, name, tensor.detach(), 0) if same_shape else _whole(job, name)
            new[key] = made.clone()  # a tensor of a safetensors file is a view of all of it
        changed[name] = new[key]
        job.progress(tensor.nbytes)
    return {**content, "state_dict": changed} if "state_dict" in content else changed


def _with_dtype(config: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Replace the dtypes that a config names, also in the configs of a model's parts."""
    known = {str(dtype).removeprefix("torch.") for dtype in MERGEABLE_DTYPES}
    changed = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value in known:
            changed[key] = str(dtype).removeprefix("torch.")
    return changed
