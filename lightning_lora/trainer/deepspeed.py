"""DeepSpeedStrategy with ZeRO stages 1 to 3: every rank holds a part of the optimizer, at stage 3 also of the model.

DeepSpeed trains float32 copies of the trained parameters. In stages 1 and 2 these lie group by group one after the
other in a flat tensor, of which each rank keeps an equal part, and so do the states of the optimizer. At stage 3 each
rank keeps an equal slice of each flattened parameter (distributed/flat.py), and gathers a module's parameters for its
forward. DeepSpeed's own files depend on the number of ranks. So an ordinary checkpoint is written beside them, with
whole tensors, and only that is loaded.

    epoch=1.ckpt/adapter.ckpt   the ordinary checkpoint, which one device, DDP or any number of ranks goes on from
    epoch=1.ckpt/checkpoint/    DeepSpeed's own files

DeepSpeed's classes are recognised by name and by attributes, so that it is not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.flat import FlatShard, attach, flat_shard, is_flat, recognise, whole_shape
from ..distributed.sharding import detached, local
from ..errors import LoRAError
from ..exchange.checkpoint_of_model import gathered_state, load_whole_state_
from ..formats.deepspeed_folder import BESIDE_ENGINE
from ..model.adapted_model import AdaptedModel, find_model
from ..model.merging import FoundState, unmerge_listed
from ..model.patches import call_previous, is_patched, patch
from ..names import META, canonical
from ..nn.low_rank import HALF
from ..notices import tell

REMEDY = (
    "Use DeepSpeedStrategy(stage=2), ModelParallelStrategy with fully_shard (FSDP2) in configure_model, or "
    "strategy='ddp' where the base fits on one device."
)
PARTS = "lora_optimizer_parts"  # attribute of a strategy: the _Flat of the last fit
LOSS_SCALE = "loss_scale"  # entry of the optimizer's state dict, under fp16
SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what DeepSpeed's scaler changes
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}  # by DeepSpeed's options


class Group(NamedTuple):
    """A group of an optimizer, as configure_optimizers built it."""

    options: dict[str, Any]
    parameters: list[nn.Parameter]


# --- what cannot be right is refused in setup ---


def prepare_deepspeed(strategy: Any) -> None:
    """Patch how a DeepSpeedStrategy sets up its engine, and how it saves and loads checkpoints.

    Raises:
        LoRAError: its options cannot be used, or DeepSpeed is not installed. The message says what to do.
    """
    config = getattr(strategy, "config", None)
    for reason in _refused(config if isinstance(config, Mapping) else {}):
        raise LoRAError(f"LoRACallback: DeepSpeedStrategy cannot be used so: {reason}. {REMEDY}")
    if find_spec("deepspeed") is None:
        raise LoRAError(
            "LoRACallback: DeepSpeedStrategy needs DeepSpeed, which is not installed. Run pip install "
            "'lightning-lora[deepspeed]'."
        )
    recognise(_attach_slice)
    if is_patched(strategy, "save_checkpoint", _save_checkpoint):
        return  # in an earlier stage
    patch(strategy, "init_deepspeed", _init_deepspeed)
    patch(strategy, "_setup_model_and_optimizer", _set_up_optimizer)
    patch(strategy, "optimizer_state", _optimizer_state)
    patch(strategy, "save_checkpoint", _save_checkpoint)
    patch(strategy, "load_checkpoint", _load_checkpoint)
    patch(strategy, "load_model_state_dict", _load_model_state_dict)
    patch(strategy, "lightning_module_state_dict", _state_dict)


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reason for each of DeepSpeed's options that cannot be used."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        yield f"its stage is {stage!r}, and 1, 2 and 3 are supported"
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            yield f"{name} to NVMe keeps in files what a checkpoint has to hold; device='cpu' is supported"
    for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            yield f"{name} (ZeRO++) sends rounded values, so what was merged is not restored exactly"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        yield "zero_hpz_partition_size (ZeRO++) keeps second copies of weights, which merging does not reach"
    if zero.get("mics_shard_size", -1) > 0:
        yield "mics_shard_size (MiCS) divides weights over groups of ranks in a way of its own"
    if zero.get("zenflow"):
        yield "zenflow keeps a part of the optimizer's states where a checkpoint does not find them"
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        yield "tensor_parallel.autotp_size splits layers after they were adapted"


# --- slices of stage 3 ---


def _attach_slice(tensor: torch.Tensor) -> bool:
    """Make a parameter that stage 3 has divided known as flat, and return whether it is one."""
    if getattr(tensor, "ds_tensor", None) is None:
        return False
    attach(tensor, partial(_slice_of, tensor), partial(_free, tensor))
    return True


def _slice_of(parameter: Any) -> FlatShard:
    """Return this rank's slice of a parameter, without the values that fill the last slice up."""
    part, group = parameter.ds_tensor, parameter.ds_process_group
    start = min(part.ds_numel * dist.get_rank(group), parameter.ds_numel)
    count = min(part.ds_numel, parameter.ds_numel - start)
    return FlatShard(part.detach()[:count], start, parameter.ds_shape, group, parameter.device)


def _free(parameter: Any) -> None:
    """Let the slice be the only copy of a parameter, which a forward has gathered or was about to. In place.

    DeepSpeed gathers small parameters once for many forwards. An exception inside a forward leaves others gathered, and
    noted as in use.
    """
    if parameter.ds_status.name == "INFLIGHT":
        optimizer = getattr(parameter, "_z3_optimizer", None)
        coordinator = (optimizer.parameter_offload if optimizer is not None else None).get_param_coordinator()
        coordinator._clean_inflight_param_registry()
    if parameter.ds_status.name == "AVAILABLE":
        parameter.ds_active_sub_modules.clear()
        parameter.partition()


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Leave deepspeed.zero.Init inside the block: there every new tensor is cast, moved and divided."""
    partition = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partition is None:
        yield
        return
    partition.shutdown_init_context()
    try:
        yield
    finally:
        partition.restore_init_context()


# --- the engine is set up ---


def _init_deepspeed(strategy: Any, previous: Callable[..., Any] | None) -> None:
    """Set the engine up, which casts each parameter by itself, and say so: the patched init_deepspeed."""
    handle = find_model(strategy.lightning_module)
    names = [name for name in DTYPES if (strategy.config.get(name) or {}).get("enabled")]
    factors = [factor for layer in handle.layers.values() for factor in layer.factors()] if handle is not None else []
    if names and any(factor.dtype != DTYPES[names[0]] for factor in factors):
        dtype = str(DTYPES[names[0]]).removeprefix("torch.")
        tell(
            f"LoRACallback: DeepSpeed casts the adapter to {dtype} with the model, "
            "and trains float32 copies, which checkpoints hold. autocast_adapter_dtype=True does not change that."
        )
    call_previous(strategy, previous, "init_deepspeed")


def _set_up_optimizer(
    strategy: Any, previous: Callable[..., Any] | None, model: Any, optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Note the optimizer's groups, which DeepSpeed replaces by flat tensors: the patched _setup_model_and_optimizer."""
    order = []
    for number, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        parameters = list(group["params"])
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            raise LoRAError(
                f"LoRACallback: group {number} of the optimizer holds frozen parameters alone ({len(parameters)}), and "
                "DeepSpeed fails at such a group. Build the groups in configure_optimizers from parameters that are "
                "trained: [p for p in self.parameters() if p.requires_grad]."
            )
        order.append(Group(_plain_options(group), parameters))
    found = call_previous(strategy, previous, "_setup_model_and_optimizer", model, optimizer, *args, **kwargs)
    if find_model(strategy.lightning_module) is not None:
        setattr(strategy, PARTS, _states_of(found[1], order))
    return found


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


def copy_to_optimizer_(optimizers: Iterable[Any]) -> None:
    """Give DeepSpeed's float32 copies the values of the parameters, which something has written since. In place."""
    for optimizer in optimizers:
        if _groups_of(optimizer) is not None:
            _states_of(optimizer).write_values_({id(each): detached(each) for each in held_parameters(optimizer)})


def is_stepping(optimizer: Any) -> bool:
    """Return whether the next call of step changes the parameters. DeepSpeed accumulates gradients by itself."""
    boundary = getattr(optimizer, "is_gradient_accumulation_boundary", True)  # older DeepSpeed: an attribute
    return bool(boundary() if callable(boundary) else boundary)


@contextmanager
def with_whole_gradients(optimizer: Any) -> Iterator[None]:
    """Let parameters have their gradients inside the block. DeepSpeed keeps parts of them elsewhere. Collective."""
    parameters = held_parameters(optimizer) if _groups_of(optimizer) is not None else []
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            _set_gradient_(parameter, _whole_gradient(optimizer, parameter).to(parameter.dtype))
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            _set_gradient_(parameter, gradient)


def _whole_gradient(optimizer: Any, parameter: Any) -> torch.Tensor:
    """Return the gradient of a parameter that DeepSpeed trains. Collective."""
    whole = optimizer.get_fp32_grad_for_param(parameter) if is_flat(parameter) else parameter.get_full_hp_grad()
    return cast(torch.Tensor, whole)


def _set_gradient_(parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
    """Set a gradient, which torch wants to have the shape of the parameter: a divided parameter is empty. In place."""
    own = parameter.data
    if gradient is not None:
        parameter.data = own.new_empty(1).expand(gradient.shape)
    parameter.grad, parameter.data = gradient, own


# --- checkpoints ---


def _optimizer_state(strategy: Any, previous: Callable[..., Any] | None, optimizer: Any) -> Any:
    """Return the state dict that the optimizer would have on one device: the patched optimizer_state. Collective."""
    flat = getattr(strategy, PARTS, None)
    if flat is None or find_model(strategy.lightning_module) is None:
        return call_previous(strategy, previous, "optimizer_state", optimizer)
    states, groups, first = flat.states(), iter(flat.options()), 0
    state: dict[int, dict[str, Any]] = {}
    packed = []
    for group in flat.order:
        numbers = list(range(first, first + len(group.parameters)))
        first += len(numbers)
        state |= {n: states[id(p)] for n, p in zip(numbers, group.parameters, strict=True) if states.get(id(p))}
        options = next(groups) if group.parameters else group.options  # DeepSpeed leaves out groups without parameters
        packed.append({**options, "params": numbers})
    return {"state": state, "param_groups": packed, **flat.loss_scale()}


def _state_dict(strategy: Any, previous: Callable[..., Any] | None) -> Any:
    """Gather what the module's kind of checkpoint holds: the patched lightning_module_state_dict. Collective."""
    handle = find_model(strategy.lightning_module)
    if handle is None or not any(map(is_flat, handle.model.parameters())):
        return call_previous(strategy, previous, "lightning_module_state_dict")
    return gathered_state(handle, keep=strategy.is_global_zero)


def _save_checkpoint(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint: Mapping[str, Any], filepath: Any, **kwargs: Any
) -> None:
    """Save DeepSpeed's own files, and beside them an ordinary checkpoint: the patched save_checkpoint. Collective."""
    handle = find_model(strategy.lightning_module)
    if handle is None:
        call_previous(strategy, previous, "save_checkpoint", checkpoint, filepath, **kwargs)
        return
    folder = Path(strategy.broadcast(filepath))
    content = dict(checkpoint)
    if hasattr(strategy, PARTS):
        _take_float32_values(handle, content, getattr(strategy, PARTS))
    if _can_save(strategy.deepspeed_engine):
        with _saving_as(handle, strategy.deepspeed_engine):
            plain = {name: value for name, value in checkpoint.items() if name != META}
            call_previous(strategy, previous, "save_checkpoint", plain, folder, **kwargs)
    if strategy.is_global_zero:
        strategy.checkpoint_io.save_checkpoint(content, folder / BESIDE_ENGINE if folder.is_dir() else folder)


def _can_save(engine: Any) -> bool:
    """Return whether DeepSpeed's engine can save: that of an evaluation at stage 3 cannot. Then a file is all."""
    return getattr(engine, "checkpoint_engine", engine) is not None


@contextmanager
def _saving_as(handle: AdaptedModel, engine: Any) -> Iterator[None]:
    """Let DeepSpeed's engine save the base as it is unmerged, and frozen weights with save="full" alone. Collective."""
    own, found = engine.save_checkpoint, FoundState(handle)

    def save(*args: Any, **options: Any) -> Any:
        return own(*args, **options | {"exclude_frozen_parameters": handle.record.save != "full"})

    vars(engine)["save_checkpoint"] = save
    try:
        if found.merged and any(map(is_flat, handle.model.parameters())):  # else its state dict shows the base
            unmerge_listed(handle)
        yield
    finally:
        del vars(engine)["save_checkpoint"]
        found.bring_back()


def _take_float32_values(handle: AdaptedModel, content: MutableMapping[str, Any], flat: _States) -> None:
    """Put float32 copies of trained parameters into a checkpoint that holds them rounded to 16 bits. Collective."""
    if META not in content or not any(parameter.dtype in HALF for group in flat.groups for parameter in group):
        return
    values = flat.values()
    merged = handle.record.save == "merged"
    holder = content[META] if merged else content
    key = "adapter" if merged else "state_dict"
    parameters = handle.model.named_parameters(remove_duplicate=False)
    copies = {canonical(name): values[id(p)] for name, p in parameters if id(p) in values}
    tensors = dict(holder[key])
    for name, value in holder[key].items():
        copy = copies.get(canonical(name))
        if copy is not None and value.dtype in HALF and torch.equal(copy.to(value.dtype), value.cpu()):
            tensors[name] = copy  # other values, such as an average of the weights, stay
    if merged:
        content[META] = {**holder, key: tensors}
    else:
        content[key] = tensors


def _load_checkpoint(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Read the ordinary checkpoint of a folder, or one that another strategy saved: the patched load_checkpoint."""
    if find_model(strategy.lightning_module) is None:
        return call_previous(strategy, previous, "load_checkpoint", checkpoint_path, *args, **kwargs)
    path = Path(checkpoint_path)
    if path.is_dir():
        path = path / BESIDE_ENGINE
        if not path.is_file():
            raise LoRAError(
                f"{path}: there is no such file, so {path.parent} was not saved with LoRACallback under DeepSpeed. To "
                "train an adapter on the weights in it, load them into the model first, as with deepspeed.utils."
                "zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint, and leave ckpt_path out."
            )
    return strategy.checkpoint_io.load_checkpoint(path, **kwargs)


def _load_model_state_dict(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint: Mapping[str, Any], strict: bool = True
) -> None:
    """Load the model, and in a fit DeepSpeed's optimizer too: the patched load_model_state_dict. Collective.

    Lightning calls no other method of the strategy for the optimizer, because DeepSpeed would have loaded it already.
    """
    module = strategy.lightning_module
    if find_model(module) is None:
        call_previous(strategy, previous, "load_model_state_dict", checkpoint, strict=strict)
        return
    state = checkpoint["state_dict"]
    load_whole_state_(module, state, strict=strict)
    if module.trainer.state.fn != "fit":
        return
    flat: _States = getattr(strategy, PARTS)
    parameters = {canonical(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    loaded = {id(p): detached(p) for p in held_parameters(flat.optimizer)}  # what a lenient load has left out stays
    loaded |= {id(parameters[n]): v for n, v in state.items() if n in parameters and id(parameters[n]) in loaded}
    flat.write_values_(loaded)
    states = checkpoint.get("optimizer_states")
    if not states:
        raise LoRAError(
            "LoRACallback: the checkpoint at ckpt_path holds weights only, without the optimizer's state that a fit "
            "goes on with. To start a new fit from them, call load_adapter(model, path) and leave ckpt_path out."
        )
    _load_optimizer_state_(flat, states[0])


def _load_optimizer_state_(flat: _States, saved: Mapping[str, Any]) -> None:
    """Load a state dict as it would be on one device into this rank's part. In place."""
    order = flat.order
    sizes, expected = ([len(g["params"]) for g in saved["param_groups"]], [len(g.parameters) for g in order])
    if sizes != expected:
        raise LoRAError(
            f"LoRACallback: the optimizer in the checkpoint has groups of {sizes} parameters, and configure_optimizers "
            f"built groups of {expected}. Build the same groups, or call load_adapter(model, path) and leave ckpt_path "
            "out to start a new fit."
        )
    pairs = [
        (n, p)
        for old, new in zip(saved["param_groups"], order, strict=True)
        for n, p in zip(old["params"], new.parameters, strict=True)
    ]
    states = {id(p): saved["state"][n] for n, p in pairs if n in saved["state"]}
    flat.write_states_(states, [_plain_options(g) for g in saved["param_groups"] if g["params"]])
    flat.write_loss_scale_(saved.get(LOSS_SCALE, {}))


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _states_of(optimizer: Any, order: Sequence[Group] = ()) -> _States:
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


class _States:
    """This rank's part of the tensors of DeepSpeed's optimizer: float32 copies of parameters, and their states.

    Attributes:
        order: the optimizer's groups as they were built; of an optimizer in DeepSpeed's config, as that made them.
        groups: the parameters of each part.
        parts: for each group, this rank's part of the float32 copies, one after the other.
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
        return [_plain_options(self.inner.param_groups[number]) for number in dict.fromkeys(self.numbers)]

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


class _InFlatTensors(_States):
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


class _InSlices(_States):
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
