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
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ..distributed.copies import add_keeper
from ..distributed.flat import FlatShard, attach, is_flat, recognise
from ..distributed.sharding import detached
from ..errors import LoRAError
from ..exchange.checkpoint_of_model import gathered_state, load_whole_state_
from ..formats.deepspeed_folder import BESIDE_ENGINE
from ..model.adapted_model import AdaptedModel, find_model
from ..model.merging import FoundState, unmerge_listed
from ..model.patches import call_previous, is_patched, patch
from ..names import META, canonical
from ..nn.low_rank import HALF
from ..notices import tell
from .deepspeed_optimizer import LOSS_SCALE, Group, ZeroStates, held_parameters, plain_options, states_of
from .distributed_resume import refuse_other_groups, refuse_weights_only

REMEDY = (
    "Use DeepSpeedStrategy(stage=2), ModelParallelStrategy with fully_shard (FSDP2) in configure_model, or "
    "strategy='ddp' where the base fits on one device."
)
PARTS = "lora_optimizer_parts"  # attribute of a strategy: the ZeroStates of the last fit
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}  # by DeepSpeed's options


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


class _Current:
    """The part of DeepSpeed's present engine that gathers parameters and frees them."""

    offload: ClassVar[Callable[[], Any]] = staticmethod(lambda: None)


def _free(parameter: Any) -> None:
    """Let the slices be the only copies of parameters that a forward has gathered, or had begun to gather. In place.

    DeepSpeed gathers small parameters once for many forwards, and others ahead of time. An exception inside a forward
    leaves some gathered, and noted as in use.
    """
    if parameter.ds_status.name == "NOT_AVAILABLE":
        return
    offload = _Current.offload()
    if offload is not None:
        offload.partition_all_parameters()  # of the whole model: the others are found free then
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
    optimizer = strategy.deepspeed_engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)
    if hasattr(offload, "partition_all_parameters"):
        _Current.offload = weakref.ref(offload)


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
        order.append(Group(plain_options(group), parameters))
    found = call_previous(strategy, previous, "_setup_model_and_optimizer", model, optimizer, *args, **kwargs)
    if find_model(strategy.lightning_module) is not None:
        parts = states_of(found[1], order)
        setattr(strategy, PARTS, parts)
        add_keeper(parts)
    return found


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
    return getattr(engine, "checkpoint_engine", None) is not None


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


def _take_float32_values(handle: AdaptedModel, content: MutableMapping[str, Any], flat: ZeroStates) -> None:
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
    flat: ZeroStates = getattr(strategy, PARTS)
    parameters = {canonical(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    loaded = {id(p): detached(p) for p in held_parameters(flat.optimizer)}  # what a lenient load has left out stays
    loaded |= {id(parameters[n]): v for n, v in state.items() if n in parameters and id(parameters[n]) in loaded}
    flat.write_values_(loaded)
    states = checkpoint.get("optimizer_states")
    if states:
        _load_optimizer_state_(flat, states[0])
    else:
        refuse_weights_only(strategy)


def _load_optimizer_state_(flat: ZeroStates, saved: Mapping[str, Any]) -> None:
    """Load a state dict as it would be on one device into this rank's part. In place."""
    order = flat.order
    refuse_other_groups([len(g["params"]) for g in saved["param_groups"]], [len(g.parameters) for g in order])
    pairs = [
        (n, p)
        for old, new in zip(saved["param_groups"], order, strict=True)
        for n, p in zip(old["params"], new.parameters, strict=True)
    ]
    states = {id(p): saved["state"][n] for n, p in pairs if n in saved["state"]}
    flat.write_states_(states, [plain_options(g) for g in saved["param_groups"] if g["params"]])
    flat.write_loss_scale_(saved.get(LOSS_SCALE, {}))
