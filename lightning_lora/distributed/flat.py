"""Flat slices: each rank holds a slice of the flattened weight, as DeepSpeed's ZeRO-3 and FSDP1 divide weights.

A tensor is flat where `attach` was called on it. A strategy's own file does that, at once or when it recognises a
tensor as its own, and says how the slice is found: a function, because strategies replace the memory of a slice. No
strategy is known here. The shape, values and size of a flat parameter itself tell nothing: it is empty, or gathered for
a forward. Ask whole_shape and flat_shard.

A slice of a matrix is at most three matrices: a row's end, whole rows, a row's beginning. So what is computed by
elements is computed in the memory of the slice, and nothing is gathered for it.

Functions marked "Collective" communicate: every rank must call them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import nn

FIND, FREE = "lora_find_slice", "lora_free_gathered"  # attributes of a flat tensor
UNIT, INSIDE = "lora_unit", "lora_flat_parameters"  # attributes of a module that owns flat tensors


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


class Unit(Protocol):
    """Flat tensors that a strategy gathers together for a forward, in place of which it then puts plain tensors."""

    def free(self) -> None:
        """Drop what was gathered and put the flat tensors back, unless a forward or backward uses it now."""

    def suspend(self, verb: str) -> bool:
        """Do the same for a forward that runs now. Returns whether one does.

        Args:
            verb: the public function that the user called, for the message.

        Raises:
            LoRAError: a backward runs, which cannot go on with other values.
        """

    def resume(self, runs: bool, changed: bool) -> None:
        """Gather the present values for a forward that was suspended. Collective for such a forward.

        Args:
            runs: what `suspend` returned.
            changed: values were written, so that a backward of an earlier forward has to raise as on one device.
        """


class _Known:
    """Whether this process has flat tensors at all, so that others are not looked at one by one; who attaches them."""

    flat = False
    attachers: ClassVar[list[Callable[[torch.Tensor], bool]]] = []


def attach(tensor: torch.Tensor, find: Callable[[], FlatShard], free: Callable[[], None] | None = None) -> None:
    """Make a tensor flat.

    Args:
        tensor: usually a parameter.
        find: returns this rank's slice as it is now.
        free: drops memory into which the whole tensor was gathered, so that the next forward gathers it again.
    """
    _Known.flat = True
    vars(tensor)[FIND], vars(tensor)[FREE] = find, free


def attach_owner(module: nn.Module, unit: Unit, inside: Mapping[str, nn.Parameter]) -> None:
    """Note how a module is given its flat tensors back, where a strategy puts gathered tensors in their place.

    Args:
        module: an owner of flat parameters.
        unit: to which they belong.
        inside: the module's own parameters that the strategy has laid into a flat one, by name.
    """
    vars(module)[UNIT], vars(module)[INSIDE] = unit, inside


def owns_flat(module: nn.Module) -> bool:
    """Return whether attach_owner was called on a module."""
    return UNIT in vars(module)


def flat_parameters(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return a module's own parameters that a strategy has laid into a flat one, by name; see attach_owner."""
    inside: Mapping[str, nn.Parameter] = vars(module).get(INSIDE, {})
    return inside


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters by name, also where a strategy has put gathered tensors in their place."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    for name, parameter in flat_parameters(module).items():
        if not isinstance(own.get(name), nn.Parameter):
            own[name] = parameter
    if isinstance(module, torch.jit.ScriptModule):
        _mark_as_parameters(own.values())
    return own


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Return a module's own parameter "weight", or None. TorchScript's mapping of parameters has no `get`."""
    parameters = module._parameters
    if "weight" not in parameters:
        return None
    return parameters["weight"]


def _mark_as_parameters(tensors: Iterable[torch.Tensor]) -> None:
    """Let isinstance(tensor, nn.Parameter) be true for the parameters of a TorchScript module.

    torch.jit.load and copy.deepcopy give them as plain tensors, which would be taken for buffers. The attribute is the
    one by which torch itself recognises parameters of other tensor classes.
    """
    for tensor in tensors:
        if not isinstance(tensor, nn.Parameter):
            tensor._is_param = True


def recognise(attach_one: Callable[[torch.Tensor], bool]) -> None:
    """Let a strategy recognise its own tensors when they are first asked for; harmless when repeated.

    Args:
        attach_one: calls `attach` for a tensor that the strategy has divided. Returns whether it did.
    """
    _Known.flat = True
    if attach_one not in _Known.attachers:
        _Known.attachers.append(attach_one)


def make_plain(tensor: torch.Tensor) -> None:
    """Make a tensor plain again, whose whole values are in it now."""
    vars(tensor).pop(FIND, None)
    vars(tensor).pop(FREE, None)


def are_any_flat() -> bool:
    """Return whether this process ever had a flat tensor. In a compiled forward none counts, see is_flat."""
    return _Known.flat and not torch.compiler.is_compiling()


def is_flat(tensor: object) -> bool:
    """Return whether a tensor is flat. In a compiled forward none counts as flat: the weights are gathered there."""
    if not _Known.flat or torch.compiler.is_compiling() or not isinstance(tensor, torch.Tensor):
        return False
    return FIND in vars(tensor) or any(attach_one(tensor) for attach_one in _Known.attachers)


def flat_shard(tensor: torch.Tensor) -> FlatShard:
    """Return this rank's slice of a flat tensor."""
    return cast(FlatShard, vars(tensor)[FIND]())


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of the whole tensor, flat or not."""
    return flat_shard(tensor).shape if is_flat(tensor) else tensor.shape


def free_gathered(tensors: Iterable[object]) -> None:
    """Drop what was gathered of flat tensors, so that changes of their slices count."""
    for tensor in tensors:
        if is_flat(tensor):
            free = vars(tensor)[FREE]
            if free is not None:
                free()


def free_owners(modules: Iterable[nn.Module]) -> None:
    """Give modules their flat tensors back in place of gathered ones, unless a forward uses these now. In place."""
    for unit in _units(modules):
        unit.free()


@contextmanager
def suspended(modules: Iterable[nn.Module], verb: str, *, changes: bool) -> Iterator[None]:
    """Give modules their flat tensors back inside the block, also where a forward has gathered them and runs now.

    Collective where such a forward runs. It goes on with the values from after the block.

    Args:
        modules: all modules of a model.
        verb: the public function that the user called, for a message.
        changes: whether anything is written.

    Raises:
        LoRAError: a backward runs.
    """
    runs: dict[Unit, bool] = {}
    try:
        for unit in _units(modules) if are_any_flat() else ():
            runs[unit] = unit.suspend(verb)
        yield
    finally:
        for unit, did_run in runs.items():
            unit.resume(did_run, changes)


def _units(modules: Iterable[nn.Module]) -> list[Unit]:
    """Return the units to which modules belong, each once."""
    found = (vars(module).get(UNIT) for module in modules)
    return list(dict.fromkeys(unit for unit in found if unit is not None))


def flat_like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a new flat tensor: divided like `tensor`, with these values (n,) as its slice."""
    shard = flat_shard(tensor)._replace(values=values.view(-1))
    found = shard.values.view(-1)
    attach(found, lambda: shard)
    return found


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, on the device that holds the slice. Collective.

    Bits travel as bytes, so that -0.0 and NaN stay what they are.
    """
    shard = flat_shard(tensor)
    size = shard.values.element_size()
    whole = torch.zeros(shard.shape.numel() * size, dtype=torch.uint8, device=shard.device)
    own = shard.values.detach().contiguous().view(torch.uint8)
    whole[shard.start * size : shard.stop * size] = own.to(shard.device)
    dist.all_reduce(whole, group=shard.group)  # gloo has no sum of 16-bit integers
    return whole.view(shard.values.dtype).view(shard.shape).to(shard.values.device)


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


def flat_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return rows of a flat matrix by number, (len(rows), columns), whole on every rank. Collective."""
    shard = flat_shard(tensor)
    width = shard.shape[1]
    values = torch.zeros(len(rows), width, dtype=torch.float64, device=shard.values.device)
    for place, row in enumerate(rows):
        first, last = max(shard.start, row * width), min(shard.stop, (row + 1) * width)
        if first < last:
            values[place, first - row * width : last - row * width] = shard.values[
                first - shard.start : last - shard.start
            ].double()
    values = values.to(shard.device)
    dist.all_reduce(values, group=shard.group)
    return values.to(shard.values.device, shard.values.dtype)


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
