"""Flat slices: each rank holds a slice of the flattened weight, as DeepSpeed's ZeRO-3 and FSDP1 divide weights.

A tensor is flat where `mark_as_flat` was called on it, which says how the slice is found: a function, because
strategies replace the memory of a slice. A parameter of ZeRO-3 is flat as soon as DeepSpeed has divided it. The shape,
values and size of a flat parameter itself tell nothing: it is empty, or gathered for a forward. Ask unsharded_shape and
flat_shard.

A slice of a matrix is at most three matrices: a row's end, whole rows, a row's beginning. So what is computed by
elements is computed in the memory of the slice, and nothing is gathered for it.

Functions marked "Collective" communicate: every rank must call them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..private.deepspeed import ZERO, slice_of_zero
from ..private.torch import mark_as_parameter_

FIND = "lora_find_slice"  # attribute of a tensor that `mark_as_flat` was called on
UNIT, INSIDE = "lora_unit", "lora_flat_parameters"  # attributes of a module


class FlatShard(NamedTuple):
    """The slice of a tensor that is on this rank: `values` (n,) are elements start to start + n of the whole tensor."""

    values: torch.Tensor  # a view of the slice's own memory, contiguous
    start: int
    shape: torch.Size  # of the whole tensor
    group: Any  # the process group over which the tensor is divided
    device: torch.device  # on which ranks exchange values; an offloaded slice lies on another one

    @property
    def stop(self) -> int:
        """The number of the first element after the slice."""
        return self.start + self.values.numel()


class Piece(NamedTuple):
    """A part of a slice that is a matrix, with its place in the whole weight."""

    rows: slice
    columns: slice


class Window(NamedTuple):
    """A part of this rank's shard that is a matrix."""

    values: torch.Tensor  # a view
    rows: slice  # in the whole weight, as columns are
    columns: slice
    begin: int | None = None  # the number of its first element in a flat slice; None for a shard that is a matrix


class Unit(Protocol):
    """Flat tensors that a strategy gathers together for a forward, in place of which it then puts plain tensors."""

    def free(self) -> None:
        """Drop what was gathered and put the flat tensors back, unless a forward or backward uses it now."""

    def begin_writing(self, verb: str) -> None:
        """Let a backward of an earlier forward raise, as on one device, because slices are written now.

        Args:
            verb: the public function that the user called, for the message.

        Raises:
            LoRAError: a forward or backward runs, which would go on with what it has gathered.
        """


def mark_as_flat(tensor: torch.Tensor, find: Callable[[], FlatShard]) -> None:
    """Make a tensor flat.

    Args:
        tensor: usually a parameter.
        find: returns this rank's slice as it is now.
    """
    vars(tensor)[FIND] = find


def note_unit(module: nn.Module, unit: Unit) -> None:
    """Note who frees what is gathered for a module's forward, so that changes of slices count."""
    vars(module)[UNIT] = unit


def note_owner(module: nn.Module, unit: Unit, inside: Mapping[str, nn.Parameter]) -> None:
    """Note how a module is given its flat tensors back, where a strategy puts gathered tensors in their place.

    Args:
        module: an owner of flat parameters.
        unit: to which they belong.
        inside: the module's own parameters that the strategy has laid into a flat one, by name.
    """
    note_unit(module, unit)
    vars(module)[INSIDE] = inside


def owns_flat(module: nn.Module) -> bool:
    """Return whether note_owner was called on a module."""
    return INSIDE in vars(module)


def flat_parameters(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return a module's own parameters that a strategy has laid into a flat one, by name; see note_owner."""
    inside: Mapping[str, nn.Parameter] = vars(module).get(INSIDE, {})
    return inside


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters by name, also where a strategy has put gathered tensors in their place."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    for name, parameter in flat_parameters(module).items():
        if not isinstance(own.get(name), nn.Parameter):
            own[name] = parameter
    if isinstance(module, torch.jit.ScriptModule):
        for parameter in own.values():
            if not isinstance(parameter, nn.Parameter):
                mark_as_parameter_(parameter)
    return own


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Return a module's own parameter "weight", or None. TorchScript's mapping of parameters has no `get`."""
    parameters = module._parameters
    if "weight" not in parameters:
        return None
    return parameters["weight"]


def is_flat(tensor: object) -> bool:
    """Return whether a tensor is flat. In a compiled forward none counts as flat: the weights are gathered there."""
    is_divided = getattr(tensor, FIND, None) is not None or getattr(tensor, ZERO, None) is not None
    return is_divided and not torch.compiler.is_compiling()


def is_gathered(tensor: torch.Tensor) -> bool:
    """Return whether a tensor shows values that ranks have gathered, in place of its slice."""
    return is_flat(tensor) and tensor.numel() > 0


def shows_nothing(tensor: torch.Tensor) -> bool:
    """Return whether a tensor shows no values, because each rank has a slice of it elsewhere."""
    return is_flat(tensor) and tensor.numel() == 0


def flat_shard(tensor: torch.Tensor) -> FlatShard:
    """Return this rank's slice of a flat tensor."""
    find: Callable[[], FlatShard] | None = getattr(tensor, FIND, None)
    return FlatShard(*slice_of_zero(tensor)) if find is None else find()


def unsharded_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of the whole tensor, flat or not."""
    return flat_shard(tensor).shape if is_flat(tensor) else tensor.shape


def free_gathered(modules: Iterable[nn.Module]) -> None:
    """Give modules their flat tensors back in place of gathered ones, unless a forward uses these now. In place."""
    for unit in _units(modules):
        unit.free()


def begin_writing(modules: Iterable[nn.Module], verb: str) -> None:
    """Prepare modules for a change of their flat tensors.

    Args:
        modules: all modules of a model.
        verb: the public function that the user called, for the message.

    Raises:
        LoRAError: a strategy cannot take the change now.
    """
    for unit in _units(modules):
        unit.begin_writing(verb)


def _units(modules: Iterable[nn.Module]) -> list[Unit]:
    """Return the units to which modules belong, each once."""
    found = (vars(module).get(UNIT) for module in modules)
    return list(dict.fromkeys(unit for unit in found if unit is not None))


def flat_like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a new flat tensor: divided like `tensor`, with these values (n,) as its slice."""
    shard = flat_shard(tensor)._replace(values=values.view(-1))
    found = shard.values.view(-1)
    mark_as_flat(found, lambda: shard)
    return found


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, on the device that holds the slice. Collective.

    Each rank sends its slice, as bytes, so that -0.0 and NaN stay what they are.
    """
    shard = flat_shard(tensor)
    size = shard.values.element_size()
    whole = torch.empty(shard.shape.numel() * size, dtype=torch.uint8, device=shard.device)
    own = shard.values.detach().contiguous().view(torch.uint8)
    whole[shard.start * size : shard.stop * size] = own.to(shard.device)
    for rank, start, stop in _places(shard):
        if start < stop:  # all_gather would take slices of one size, and FSDP1's are of any
            dist.broadcast(whole[start * size : stop * size], rank, group=shard.group)
    return whole.view(shard.values.dtype).view(shard.shape).to(shard.values.device)


def gather_flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict in which flat tensors are gathered, because their slices alone tell nothing. Collective."""
    return {name: gather(value) if is_flat(value) else value for name, value in state.items()}


def _places(shard: FlatShard) -> list[tuple[int, int, int]]:
    """Return the first and last element of each rank's slice, as (rank, start, stop). Collective."""
    ranks = dist.get_process_group_ranks(shard.group)
    own = torch.tensor([shard.start, shard.stop], device=shard.device)
    places = [torch.empty_like(own) for _ in ranks]
    dist.all_gather(places, own, group=shard.group)
    return [(rank, *place) for rank, place in zip(ranks, torch.stack(places).tolist(), strict=True)]


def scatter_(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's slice of a whole tensor into a flat one. In place."""
    shard = flat_shard(target)
    shard.values.copy_(whole.reshape(-1)[shard.start : shard.stop])


def pieces(start: int, stop: int, width: int) -> list[Piece]:
    """Return the pieces, in order, of elements start to stop of a matrix with `width` columns."""
    found = []
    while start < stop:
        row, column = divmod(start, width)
        rows = 1 if column else max(1, (stop - start) // width)
        end = min(stop, (row + rows) * width)
        found.append(Piece(slice(row, row + rows), slice(column, end - (row + rows - 1) * width)))
        start = end
    return found


def flat_samples(wanted: Sequence[tuple[torch.Tensor, Sequence[int]]]) -> list[list[float]]:
    """Return the values of flat tensors, flattened, at these positions. Collective: one exchange for each group."""
    shards = [flat_shard(tensor) for tensor, _ in wanted]
    found: dict[int, list[float]] = {}
    for group, device in dict.fromkeys((shard.group, shard.device) for shard in shards):
        inside = [i for i, shard in enumerate(shards) if (shard.group, shard.device) == (group, device)]
        parts = [_samples_here(shards[i], wanted[i][1]) for i in inside]
        values = torch.cat(parts).to(device)
        dist.all_reduce(values, group=group)
        split = torch.split(values.cpu(), [len(part) for part in parts])
        found |= {i: part.tolist() for i, part in zip(inside, split, strict=True)}
    return [found[i] for i in range(len(wanted))]


def _samples_here(shard: FlatShard, positions: Sequence[int]) -> torch.Tensor:
    """Return the values at positions, float64; zero where another rank holds them."""
    places = torch.tensor(positions, dtype=torch.long) - shard.start
    here = (places >= 0) & (places < shard.values.numel())
    values = torch.zeros(len(positions), dtype=torch.float64)
    readable = shard.values.view(torch.uint8) if shard.values.element_size() == 1 else shard.values
    values[here] = readable[places[here].to(readable.device)].view(shard.values.dtype).double().cpu()
    return values
