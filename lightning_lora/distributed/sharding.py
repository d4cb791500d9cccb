"""Sharded tensors: DTensors, which fully_shard and parallelize_module spread over ranks, and flat ones (flat.py).

Functions marked "Collective" communicate: every rank must call them, in the same order.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import LoRAError
from .flat import (
    Piece,
    Window,
    flat_like,
    flat_samples,
    flat_shard,
    free_gathered,
    gather,
    is_flat,
    own_parameters,
    pieces,
    scatter_,
    unsharded_shape,
)

if TYPE_CHECKING:  # otherwise imported where they are used: they take as long as all other imports of this package
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

PLAIN_TYPES = (torch.Tensor, nn.Parameter)
FSDP = "torch.distributed.fsdp"  # if it was never imported, no module is fully sharded


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    return type(tensor) not in PLAIN_TYPES and any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def is_spread(tensor: object) -> bool:
    """Return whether ranks hold parts of a tensor: it is a DTensor, or flat."""
    return is_sharded(tensor) or is_flat(tensor)


def dimensions_of_ranks(tensor: torch.Tensor) -> int:
    """Return over how many dimensions of ranks parts of a tensor lie: 0 for a plain tensor, 1 for a flat one.

    While FSDP2 has gathered a tensor, it is one less. A tensor that is parallel besides stays a DTensor meanwhile.
    """
    return tensor.device_mesh.ndim if is_sharded(tensor) else int(is_flat(tensor))


def is_fully_sharded(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Return whether fully_shard (FSDP2) was called on a module."""
    fsdp = sys.modules.get(FSDP)
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def holds_shards(module: nn.Module) -> bool:
    """Return whether one of the module's own parameters is sharded. Parameters that are gathered now count too."""
    return is_fully_sharded(module) or any(map(is_spread, own_parameters(module).values()))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, or a plain tensor itself. The result is detached and shares memory.

    The shard of a flat tensor has one dimension.
    """
    if not is_sharded(tensor):
        return flat_shard(tensor).values.detach() if is_flat(tensor) else tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the same memory, detached and sharded like it."""
    return flat_like(local(tensor), tensor) if is_flat(tensor) else tensor.detach()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, detached, on the device that holds the shard. Collective where it is sharded."""
    if not is_sharded(tensor):
        return gather(tensor) if is_flat(tensor) else tensor.detach()
    device = tensor.device
    with torch.inference_mode(False), torch.no_grad():
        # Collectives need the device of the mesh, and offloaded shards are on the CPU.
        moved = cast("DTensor", tensor.detach().to(tensor.device_mesh.device_type))
        return moved.full_tensor().to(device)


def _meeting_device(tensor: torch.Tensor) -> torch.device:
    """Return the device on which ranks exchange values of a tensor. An offloaded shard lies on another device."""
    if is_flat(tensor):
        return flat_shard(tensor).device
    return torch.device(tensor.device_mesh.device_type) if is_sharded(tensor) else tensor.device


def whole_on_cpu(value: Any) -> Any:
    """Return a sharded tensor gathered on the CPU; other values are unchanged. Collective."""
    return full_tensor(value).cpu().clone() if is_spread(value) else value  # gathered, it has gaps in a larger storage


def gather_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with each sharded tensor gathered on the CPU; other values are unchanged. Collective."""
    return {name: whole_on_cpu(value) for name, value in values.items()}


def rows_of(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return rows of a matrix by number, (len(rows), columns), detached, whole on every rank.

    Collective where the matrix is sharded.
    """
    shard, width = local(tensor), unsharded_shape(tensor)[1]
    if not is_spread(tensor):
        return shard[torch.tensor(rows, device=shard.device)]
    values = torch.zeros(len(rows), width, dtype=torch.float64, device=shard.device)
    for part in windows(tensor, width):
        inside = [i for i, row in enumerate(rows) if part.rows.start <= row < part.rows.stop]
        values[inside, part.columns] = part.values[[rows[i] - part.rows.start for i in inside]].double()
    return sum_over_shards(values, tensor).to(shard.dtype)


def from_local_like(shard: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor made of this rank's shard and sharded like `tensor`. If `tensor` is plain, return the shard."""
    if not is_sharded(tensor):
        return flat_like(shard, tensor) if is_flat(tensor) else shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def shard_like(whole: torch.Tensor, tensor: DTensor) -> torch.Tensor:
    """Return a whole tensor's part on this rank as a DTensor, divided as `tensor` is; the shapes may differ."""
    from torch.distributed.tensor import zeros

    target = zeros(whole.shape, dtype=whole.dtype, device_mesh=tensor.device_mesh, placements=tensor.placements)
    copy_(target, whole)
    return target


def window(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Return the position of this rank's shard in the whole tensor: one slice for each dimension. No flat tensor."""
    if not is_sharded(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    chunk = cast(Any, tensor).__create_chunk_list__()[0]  # the protocol of torch.distributed.checkpoint
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def windows(tensor: torch.Tensor, width: int) -> list[Window]:
    """Return the parts of this rank's shard as matrices.

    A plain tensor and a DTensor have one part, a flat tensor up to three, and where it is empty an empty one.

    Args:
        tensor: a weight.
        width: the number of columns of the whole weight, seen as a matrix.

    Raises:
        LoRAError: the weight is sharded along a dimension of its kernel.
    """
    if is_flat(tensor):
        shard = flat_shard(tensor)
        parts = pieces(shard.start, shard.stop, width) or [Piece(slice(0, 0), slice(0, width))]
        sizes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in parts]
        counts = [height * columns for height, columns in sizes]
        begins = itertools.accumulate(counts, initial=0)
        views = torch.split(shard.values.detach(), counts)
        together = zip(views, sizes, parts, begins, strict=False)
        return [Window(view.view(size), *part, begin) for view, size, part, begin in together]
    rows, columns, *kernel = window(tensor)
    if any(part != slice(0, size) for part, size in zip(kernel, tensor.shape[2:], strict=True)):
        raise LoRAError(f"a weight of shape {tuple(tensor.shape)} cannot be merged while it is sharded beyond dim 1")
    inner = tensor.shape[2:].numel()
    return [Window(local(tensor).flatten(1), rows, slice(columns.start * inner, columns.stop * inner))]


def sum_over_shards(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return sums over the ranks of values that each rank computed from its shard of a tensor. Collective."""
    device, values = values.device, values.to(_meeting_device(tensor))
    if is_flat(tensor):
        dist.all_reduce(values, group=flat_shard(tensor).group)
    elif is_sharded(tensor):
        split = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        reduce_(values, tensor.device_mesh, split, dist.ReduceOp.SUM)
    return values.to(device)


def copy_(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` into `target`, which has the same shape. Either may be sharded. In place.

    Collective if only `source` is sharded.
    """
    copy_all_([(target, source)])


def copy_all_(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy many pairs (target, source) as copy_ does. In place."""
    with torch.inference_mode(False), torch.no_grad():  # once for all, because it takes longer than a small copy
        for target, source in pairs:
            if is_flat(target) or is_flat(source):
                _copy_flat_(target, source)
            elif is_sharded(source) == is_sharded(target):
                target.copy_(source)
            elif is_sharded(target):
                local(target).copy_(source[window(target)])
            else:
                target.copy_(full_tensor(source))


def _copy_flat_(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of which at least one is flat. In place. Collective unless both are divided alike."""
    if not is_flat(target):
        copy_(target, full_tensor(source))
    elif is_flat(source) and flat_shard(source)[1:] == flat_shard(target)[1:]:
        local(target).copy_(local(source))
    else:
        scatter_(target, full_tensor(source))


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, detached, on the same device and with the same sharding."""
    return flat_like(local(tensor).clone(), tensor) if is_flat(tensor) else tensor.detach().clone()


def copies_of(tensors: Mapping[str, torch.Tensor], *, on_cpu: bool = False) -> dict[str, torch.Tensor]:
    """Return copies of tensors with the same sharding, on the same devices or on the CPU. A tied tensor has one copy.

    Copies of one dtype and device share one piece of memory, because allocating many small pieces takes longer than
    copying, and saving them makes a file larger.
    """
    copies: dict[str, torch.Tensor] = {}
    together: dict[tuple[torch.dtype, torch.device], dict[Any, list[str]]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            if _is_strided(tensor) and not is_flat(tensor) and not tensor.is_meta and tensor.itemsize > 1:
                memory = tensor.data_ptr(), tensor.shape, tensor.stride()
                together.setdefault((tensor.dtype, tensor.device), {}).setdefault(memory, []).append(name)
            else:
                copy = copy_of(tensor)
                copies[name] = copy.cpu() if on_cpu and not copy.is_meta else copy
        for tied in together.values():
            values = [tensors[first].detach() for first, *_ in tied.values()]
            flat = torch.cat([value.reshape(-1) for value in values])
            parts = torch.split(flat.cpu() if on_cpu else flat, [value.numel() for value in values])
            for names, value, part in zip(tied.values(), values, parts, strict=True):
                copies |= dict.fromkeys(names, part.view(value.shape))
    return {name: copies[name] for name in tensors}


def reshard_(modules: Iterable[nn.Module]) -> None:
    """Replace weights that a strategy has gathered in these modules by their shards again. In place.

    Changes of a gathered weight are lost, because the shards do not get them.
    """
    modules = list(modules)
    free_gathered(modules)
    if FSDP not in sys.modules:
        return
    for module in modules:
        if is_fully_sharded(module):
            module.reshard()


def refuse_fully_sharded(model: nn.Module, modules: Iterable[nn.Module], verb: str) -> None:
    """Refuse to take an adapter out of a model that fully_shard was called on.

    FSDP2 goes on to manage the adapter's parameters, so they cannot be removed.

    Args:
        model: for the message.
        modules: all modules of the model.
        verb: the public function that the user called, for the message.

    Raises:
        LoRAError: fully_shard was called on one of the modules.
    """
    if any(map(is_fully_sharded, modules)):
        raise LoRAError(
            f"{verb}: {type(model).__name__} was sharded by fully_shard, which keeps managing the adapter's "
            "parameters, so they cannot be removed. After merge(model) it runs at the base's speed; for plain weights, "
            "save a merged checkpoint or call save_merged(model, path)."
        )


def reduce_(values: torch.Tensor, mesh: DeviceMesh, dims: Iterable[int], op: Any) -> None:
    """Reduce values with an operation over some dimensions of a mesh. In place. Collective."""
    for dim in dims:
        dist.all_reduce(values, op, group=mesh.get_group(dim))


def samples_of_all(wanted: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> list[list[float]]:
    """Return the result of `samples` for many tensors. Plain tensors of one dtype and device are read together.

    Collective where `samples` is.

    Args:
        wanted: (tensor, positions) pairs.
    """
    indices: dict[tuple[Sequence[int], torch.device], torch.Tensor] = {}
    together: dict[tuple[torch.dtype, torch.device], dict[int, torch.Tensor]] = {}
    found: dict[int, list[float]] = {}
    flat: dict[int, tuple[torch.Tensor, Sequence[int]]] = {}
    for i, (tensor, positions) in enumerate(wanted):
        if is_flat(tensor):
            flat[i] = tensor, positions
            continue
        if not _can_be_indexed(tensor):
            found[i] = samples(tensor, positions)
            continue
        key = positions, tensor.device
        if key not in indices:
            indices[key] = torch.tensor(positions, dtype=torch.long, device=tensor.device)
        values = tensor.detach().view(-1)[indices[key]]
        together.setdefault((tensor.dtype, tensor.device), {})[i] = values
    for parts in together.values():
        all_values = torch.cat([*parts.values()]).double().tolist()
        starts = itertools.accumulate((part.numel() for part in parts.values()), initial=0)
        found |= {i: all_values[start : start + parts[i].numel()] for i, start in zip(parts, starts, strict=False)}
    found |= dict(zip(flat, flat_samples([*flat.values()]), strict=True))
    return [found[i] for i in sorted(found)]


def _can_be_indexed(tensor: torch.Tensor) -> bool:
    return _is_strided(tensor) and tensor.is_contiguous() and tensor.itemsize > 1


def _is_strided(tensor: torch.Tensor) -> bool:
    return type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided


def samples(tensor: torch.Tensor, positions: Sequence[int]) -> list[float]:
    """Return the values of the whole tensor, flattened, at these positions. Collective where it is sharded."""
    if is_flat(tensor):
        return flat_samples([(tensor, positions)])[0]
    shard, slices = local(tensor), window(tensor)
    indices = torch.unravel_index(torch.tensor(positions, dtype=torch.long), tensor.shape)
    on_shard = torch.ones(len(positions), dtype=torch.bool)
    for index, part in zip(indices, slices, strict=True):
        on_shard &= (part.start <= index) & (index < part.stop)
    inside = [(i[on_shard] - part.start).to(shard.device) for i, part in zip(indices, slices, strict=True)]
    values = torch.zeros(len(positions), dtype=torch.float64)
    readable = shard.view(torch.uint8) if shard.element_size() == 1 else shard  # torch 2.6 indexes no float8
    values[on_shard] = readable[tuple(inside)].view(shard.dtype).double().cpu()
    return cast(list[float], sum_over_shards(values, tensor).tolist())
