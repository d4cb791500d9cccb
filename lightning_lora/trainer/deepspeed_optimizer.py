"""The optimizer of DeepSpeed's engine: float32 copies of the trained parameters, and their states, divided over ranks.

A state dict with whole tensors, as of one device, is put together from them, and cut for them. DeepSpeed's classes are
recognised by attributes, so that it is not imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.copies import Written
from ..distributed.flat import flat_shard, is_flat, whole_shape
from ..distributed.sharding import detached, local
from ..errors import LoRAError

LOSS_SCALE = "loss_scale"  # entry of the optimizer's state dict, under fp16
SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what DeepSpeed's scaler changes


class Group(NamedTuple):
    """A group of an optimizer, as configure_optimizers built it."""

    options: dict[str, Any]
    parameters: list[nn.Parameter]


def held_parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the parameters that an optimizer trains. DeepSpeed's has flat tensors in its groups, and these beside."""
    groups = _groups_of(optimizer)
    if groups is None:
        groups = [group["params"] for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group]


def _groups_of(optimizer: Any) -> Sequence[Sequence[nn.Parameter]] | None:
    """Return the parameters of DeepSpeed's optimizer by groups; None for another optimizer."""
    groups: Any = getattr(optimizer, "bit16_groups", getattr(optimizer, "fp16_groups", None))
    return cast("Sequence[Sequence[nn.Parameter]] | None", groups)


def holds_copies(optimizer: Any) -> bool:
    """Return whether an optimizer is DeepSpeed's, which trains copies of some parameters."""
    return _groups_of(optimizer) is not None


def warn_of_unfrozen(optimizer: Any, unfrozen: Sequence[nn.Parameter]) -> None:
    """Warn where parameters were unfrozen after DeepSpeed chose what it trains."""
    held = {id(parameter) for parameter in held_parameters(optimizer)}
    lacking = [parameter for parameter in unfrozen if id(parameter) not in held]
    if holds_copies(optimizer) and lacking:
        warnings.warn(
            f"lightning_lora: DeepSpeed trains what was trainable when the fit began, and {len(lacking)} parameters "
            "were unfrozen since, so they stay as they are. Unfreeze them before the fit, or name their modules in "
            "modules_to_save.",
            stacklevel=2,
        )


def copy_to_optimizer_(optimizers: Iterable[Any]) -> None:
    """Give DeepSpeed's float32 copies the values of the parameters, which something has written since. In place."""
    for optimizer in optimizers:
        if _groups_of(optimizer) is not None:
            states_of(optimizer).write_values_({id(each): detached(each) for each in held_parameters(optimizer)})


def states_of(optimizer: Any, order: Sequence[Group] = ()) -> ZeroStates:
    """Return the float32 copies and the states of DeepSpeed's optimizer.

    Args:
        optimizer: DeepSpeed's.
        order: its groups as they were built; by default as DeepSpeed keeps them.

    Raises:
        LoRAError: it is an optimizer of another kind.
    """
    cls = _InSlices if hasattr(optimizer, "fp16_partitioned_groups") else _InFlatTensors
    missing = [name for name in cls.NEEDED if not hasattr(optimizer, name)]
    if missing:
        raise LoRAError(
            f"LoRACallback: DeepSpeed made a {type(optimizer).__name__}, whose states cannot be put together "
            f"(it has no {missing[0]}). Leave data_types and other optimizers' options out of DeepSpeed's config."
        )
    return cls(optimizer, order)


class ZeroStates:
    """This rank's part of the tensors of DeepSpeed's optimizer: float32 copies of parameters, and their states.

    Attributes:
        order: the optimizer's groups as they were built; of an optimizer in DeepSpeed's config, as that made them.
        groups: the parameters of each part.
        parts: for each group, this rank's part of the float32 copies, one after the other.
        shapes: of the whole parameters, by their ids.
        numbers: for each group, the number of the group of the optimizer inside, which has the options.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        optimizer: Any,
        order: Sequence[Group],
        groups: Sequence[Sequence[nn.Parameter]],
        parts: Sequence[torch.Tensor],
        numbers: Sequence[int],
    ) -> None:
        self.optimizer, self.inner = optimizer, optimizer.optimizer
        self.groups, self.parts, self.numbers = groups, parts, numbers
        self.order = order or [Group(o, list(p)) for o, p in zip(self.options(), self.groups, strict=True)]
        self.shapes = {id(p): whole_shape(p) for group in self.groups for p in group}

    def process_group(self, number: int) -> Any:
        """Return the process group over which a group's parameters are divided."""
        raise NotImplementedError

    def cut(self, number: int, parts: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return whole tensors by the parameter's id, on the CPU.

        Args:
            number: of the group.
            parts: of all ranks, in order.
        """
        raise NotImplementedError

    def part_of(self, number: int, values: Mapping[int, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return this rank's part of values of a group's parameters, on the CPU; of others zeros.

        Args:
            number: of the group.
            values: by the parameter's id: whole, or divided like the parameter.
            dtype: of the part.
        """
        raise NotImplementedError

    def options(self) -> list[dict[str, Any]]:
        """Return the options of each group that has parameters, such as its learning rate."""
        return [plain_options(self.inner.param_groups[number]) for number in dict.fromkeys(self.numbers)]

    def loss_scale(self) -> dict[str, dict[str, Any]]:
        """Return the state of the loss's scale, as an entry of a state dict; none where it does not change."""
        scaler = self.optimizer.loss_scaler
        if not scaler.dynamic:
            return {}
        return {LOSS_SCALE: {name: getattr(scaler, name) for name in SCALES if hasattr(scaler, name)}}

    def write_loss_scale_(self, state: Mapping[str, Any]) -> None:
        """Set the state of the loss's scale. In place."""
        if self.optimizer.loss_scaler.dynamic:
            vars(self.optimizer.loss_scaler).update({name: state[name] for name in SCALES if name in state})

    def values(self) -> dict[int, torch.Tensor]:
        """Return the float32 copies of all parameters, on the CPU, by the parameter's id. Collective."""
        return {
            key: value for number, part in enumerate(self.parts) for key, value in self._whole(number, part).items()
        }

    def states(self) -> dict[int, dict[str, Any]]:
        """Return the optimizer's state of each parameter, on the CPU, by the parameter's id. Collective."""
        found: dict[int, dict[str, Any]] = {}
        for number, part in enumerate(self.parts):
            for name, value in self.inner.state.get(part, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    if value.shape != part.shape:
                        raise LoRAError(
                            f"LoRACallback: {type(self.inner).__name__} keeps {name!r} of shape {tuple(value.shape)} "
                            f"for {part.numel()} values, which belongs to no parameter, so a checkpoint could not be "
                            "resumed. Use an optimizer that keeps a value for each value, such as AdamW."
                        )
                    wholes = self._whole(number, value)
                else:
                    plain = value.detach().cpu() if isinstance(value, torch.Tensor) else value
                    wholes = {
                        id(p): plain.clone() if isinstance(plain, torch.Tensor) else plain for p in self.groups[number]
                    }
                for key, whole in wholes.items():
                    found.setdefault(key, {})[name] = whole
        return found

    def write_values_(self, values: Mapping[int, torch.Tensor]) -> None:
        """Write this rank's part of the float32 copies. In place."""
        for number, part in enumerate(self.parts):
            part.data.copy_(self.part_of(number, values, part.dtype))

    def follow_(self, written: Written) -> None:
        """Write this rank's part of the float32 copies of some parameters, see distributed/copies.py. In place.

        Raises:
            LoRAError: a parameter was given another shape, which DeepSpeed does not learn of.
        """
        values = {id(p): value for p, value in written if id(p) in self.shapes}
        for key, value in values.items():
            if whole_shape(value) != self.shapes[key]:
                raise LoRAError(
                    f"load_adapter: DeepSpeed trains a parameter of shape {tuple(self.shapes[key])}, for which the "
                    f"adapter has one of {tuple(whole_shape(value))}. During a fit with DeepSpeed load adapters of the "
                    "same ranks alone; load others before the fit."
                )
        ones = {key: torch.ones(self.shapes[key], dtype=torch.bool) for key in values}
        for number, part in enumerate(self.parts):
            if any(id(p) in values for p in self.groups[number]):
                here = self.part_of(number, ones, torch.bool).to(part.device)
                part.data.copy_(torch.where(here, self.part_of(number, values, part.dtype).to(part.device), part.data))

    def write_states_(self, states: Mapping[int, Mapping[str, Any]], options: Sequence[Mapping[str, Any]]) -> None:
        """Write this rank's part of the optimizer's states, and the groups' options. In place."""
        for number, group in zip(dict.fromkeys(self.numbers), options, strict=True):
            self.inner.param_groups[number].update(group)
        for number, part in enumerate(self.parts):
            mine = {id(p): states[id(p)] for p in self.groups[number] if id(p) in states}
            if not mine:
                continue
            state = self.inner.state[part]
            shapes = {id(p): whole_shape(p) for p in self.groups[number]}
            for name in dict.fromkeys(name for each in mine.values() for name in each):
                values = {key: each[name] for key, each in mine.items() if name in each}
                first = next(iter(values.values()))
                if all(isinstance(v, torch.Tensor) and v.shape == shapes[key] and v.dim() for key, v in values.items()):
                    dtype = state[name].dtype if isinstance(state.get(name), torch.Tensor) else part.dtype
                    state[name] = self.part_of(number, values, dtype).to(part.device)
                else:
                    state[name] = first.clone() if isinstance(first, torch.Tensor) else first
        self.optimizer._hp_optimizer_states_linked = False  # the next step looks at the new tensors

    def _whole(self, number: int, part: torch.Tensor) -> dict[int, torch.Tensor]:
        """Gather a part of a group from all ranks, and cut it into parameters. Collective."""
        group = self.process_group(number)
        sent = part.detach().to(self.groups[number][0].device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, sent, group=group)
        return self.cut(number, [part.cpu() for part in parts])


class _InFlatTensors(ZeroStates):
    """Stages 1 and 2: of each group of parameters there is one flat tensor, of which each rank has an equal part.

    A parameter of the model is a view of its group's flat tensor, which tells where the copy and the states of it lie.
    After a fit Lightning moves the parameters to the CPU, so the positions are noted.
    """

    NEEDED = ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups", "real_dp_process_group")

    def __init__(self, optimizer: Any, order: Sequence[Group]) -> None:
        groups, parts = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        super().__init__(optimizer, order, groups, parts, range(len(groups)))
        self.places = [
            [(p, (p.data_ptr() - flat.data_ptr()) // flat.element_size()) for p in group]
            for group, flat in zip(self.groups, optimizer.bit16_groups_flat, strict=True)
        ]

    def process_group(self, number: int) -> Any:
        return self.optimizer.real_dp_process_group[number]

    def cut(self, number: int, parts: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        whole = torch.cat([*parts])
        return {id(p): whole[at : at + p.numel()].view(p.shape).clone() for p, at in self.places[number]}

    def part_of(self, number: int, values: Mapping[int, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        flat = torch.zeros(self.optimizer.bit16_groups_flat[number].numel(), dtype=dtype)
        for parameter, at in self.places[number]:
            if id(parameter) in values:
                flat[at : at + parameter.numel()] = values[id(parameter)].detach().reshape(-1).to("cpu", dtype)
        size = self.parts[number].numel()
        start = dist.get_rank(self.process_group(number)) * size
        return flat[start : start + size]


class _InSlices(ZeroStates):
    """Stage 3: a rank's part of a group holds its slice of each parameter, all slices of a parameter equally long."""

    NEEDED = ("fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "dp_process_group")

    def __init__(self, optimizer: Any, order: Sequence[Group]) -> None:
        groups, numbers = optimizer.fp16_groups, optimizer.sub_group_to_group_id
        parts = optimizer.fp32_partitioned_groups_flat
        super().__init__(optimizer, order, groups, parts, [numbers[i] for i in range(len(groups))])

    def process_group(self, number: int) -> Any:
        return getattr(self.groups[number][0], "ds_process_group", self.optimizer.dp_process_group)

    def cut(self, number: int, parts: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        of_ranks, found = torch.stack([*parts]), {}
        for parameter, at, size in self._slices(number):
            whole = of_ranks[:, at : at + size].reshape(-1)
            shape = whole_shape(parameter)
            found[id(parameter)] = whole[: shape.numel()].view(shape).clone()
        return found

    def part_of(self, number: int, values: Mapping[int, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        part = torch.zeros(self.parts[number].numel(), dtype=dtype)
        for parameter, at, _ in self._slices(number):
            value = values.get(id(parameter))
            if value is not None:
                shard = flat_shard(parameter)
                own = local(value) if is_flat(value) else value.detach().reshape(-1)[shard.start : shard.stop]
                part[at : at + own.numel()] = own.to("cpu", dtype)
        return part

    def _slices(self, number: int) -> Iterator[tuple[nn.Parameter, int, int]]:
        """Yield each parameter of a group with the beginning and the length of its slice."""
        at = 0
        for parameter in self.groups[number]:
            size = cast(Any, parameter).ds_tensor.ds_numel
            yield parameter, at, size
            at += size


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group of an optimizer, without its parameters."""
    return {name: value for name, value in group.items() if name != "params"}
