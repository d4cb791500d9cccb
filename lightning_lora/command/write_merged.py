"""Write merged weights, one tensor at a time."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import LoRAError
from ..files.model_folder import CONFIG, index_of, side_files
from ..files.paths import write_json
from ..files.safetensors import SUFFIX, build_header, open_safetensors, write_values
from ..files.torch_archive import write_torch_file
from ..files.weights import Weights
from ..nn.exact_merge import merged_weight
from ..nn.low_rank import HALF, MERGEABLE_DTYPES, LowRankBlock


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

    def applied(self, old: torch.Tensor, dtype: torch.dtype, cost: list[float]) -> torch.Tensor:
        """Return the new tensor in a dtype, rounded once.

        Args:
            old: the base's.
            dtype: of the result.
            cost: as of merged_weight.
        """
        weight = old
        if self.value is not None:  # the base's dtype alone would round what the result can hold
            weight = self.value.detach().to(torch.promote_types(old.dtype, dtype))
        if not self.blocks:
            return weight.to(dtype)
        matrix = weight.reshape(-1, weight.shape[-1]) if self.stacked else weight.contiguous()
        counted = cost if dtype in HALF else None
        return merged_weight(matrix, list(self.blocks), self.scaling, dtype=dtype, cost=counted).view(weight.shape)


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
        dtype = self.base.tensors[name].dtype
        return self.dtype if self.dtype is not None and dtype in MERGEABLE_DTYPES else dtype

    def result_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor of the result: what was fully trained may have another than the base's."""
        value = self.updates[name].value if name in self.updates else None
        return tuple(self.base.tensors[name].shape if value is None else value.shape)

    def result_nbytes(self, name: str) -> int:
        """Return the size of one tensor of the result, in bytes."""
        return math.prod(self.result_shape(name)) * self.result_dtype(name).itemsize


def result_tensor(job: Job, name: str) -> torch.Tensor:
    """Return a tensor of the result.

    Raises:
        LoRAError: a finite value became NaN or infinite.
    """
    old, update, dtype = job.base.tensors[name], job.updates.get(name), job.result_dtype(name)
    try:
        new = update.applied(old, dtype, job.cost) if update else old.to(dtype)
    except LoRAError as error:
        raise LoRAError(f"merge: {name!r}: {error}. Nothing was written.") from error
    start = old if update is None or update.value is None else update.value
    narrower = dtype in MERGEABLE_DTYPES and dtype != start.dtype
    if narrower and not torch.isfinite(new).all() and torch.isfinite(start).all():
        raise LoRAError(f"merge: {name!r} does not fit into {dtype}: it holds values beyond its range.")
    return new


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
    for file, shard in folder.shards.items():
        _write_safetensors(job, shard.tensors, shard.metadata, target / file)
    for path in copied:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.path / path, target / path)
    if job.dtype is not None and folder.config:
        write_json(target / CONFIG, _with_dtype(folder.config, job.dtype))
    if folder.index_name and job.dtype is None:
        shutil.copyfile(folder.path / folder.index_name, target / folder.index_name)
    elif folder.index_name:
        sizes = {file: {n: job.result_nbytes(n) for n in shard.tensors} for file, shard in folder.shards.items()}
        write_json(target / folder.index_name, index_of(sizes, folder.index))
    return left_out


def write_file_of(job: Job, target: Path) -> None:
    """Write a file in the form of the base's: safetensors, a Lightning checkpoint or a state dict."""
    if job.base.form == "torch":
        _write_torch_file(job, target)
        return
    file = job.base.shards[job.base.path.name]
    _write_safetensors(job, file.tensors, file.metadata, target)


def _write_safetensors(job: Job, names: Iterable[str], metadata: Mapping[str, str], target: Path) -> None:
    """Write some tensors of the result. Wide dtypes come first, so that all are aligned."""
    names = sorted(names, key=lambda name: (-job.result_dtype(name).itemsize, name))
    header = build_header([(name, job.result_dtype(name), job.result_shape(name)) for name in names], metadata)
    write_values(target, header, (result_tensor(job, name) for name in names), job.progress)


def _write_torch_file(job: Job, target: Path) -> None:
    """Write all that the base's file holds, with merged tensors. Tensors that share memory share it in the result too.

    The merged tensors wait in a file beside the target: torch.save needs all of them at once.
    """
    job.base.compare_check_sums()
    first: dict[Any, str] = {}
    names = {name: first.setdefault(_memory_of(tensor), name) for name, tensor in job.base.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in job.base.tensors.items()}
    changed = [name for name in first.values() if name in job.updates or job.result_dtype(name) != dtypes[name]]
    waiting = target.with_name(f"merged{SUFFIX}")
    _write_safetensors(job, changed, {}, waiting)
    new = open_safetensors(waiting).tensors
    content = job.base.checkpoint
    state = copy.copy(content.get("state_dict", content))
    state.update({name: new[names[name]] for name in names if names[name] in new})
    whole = {**content, "state_dict": state} if "state_dict" in content else state
    write_torch_file(target, whole, sum(job.result_nbytes(name) for name in names))
    waiting.unlink()


def _memory_of(tensor: torch.Tensor) -> object:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


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
