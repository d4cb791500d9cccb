"""FSDPStrategy (FSDP1): each rank keeps a slice of each frozen weight, and all that is trained whole.

FSDP1 lays the weights of a unit one after the other in a flat tensor and cuts that into equal slices. It takes no
tensors of several dtypes, and would keep gradients of frozen weights beside trained ones. So all that is trained stays
outside of the flat tensors: whole on each rank, as under DDP, with gradients that are averaged here.

    the model     W in slices: found anew for each use, because FSDP1 replaces the memory of a slice
    optimizers    whole states, because all that they train is whole
    checkpoints   as one device writes them, see one_file.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.flat import FlatShard, attach, attach_owner, begin_writing
from ..errors import LoRAError
from ..model.adapted_model import find_model
from ..model.patches import call_previous, is_patched, patch
from ..names import names_factor
from .lightning_packages import is_overridden

WRAPPING = "lora_fsdp_wrapping"  # attribute of a LightningModule: its _Wrapping
OUTSIDE = "lora_outside"  # attribute of a strategy: the parameters outside of the flat tensors
UNITS = "lora_units"  # attribute of a strategy: the wrappers with weights
WHOLE = "lora_whole_units"  # attribute of a strategy: units that are not divided, as in a single process
LATER = "lora_averages_later"  # attribute of a strategy while gradients are accumulated
ALTERNATIVES = (
    "ModelParallelStrategy with fully_shard (FSDP2) in configure_model, or strategy='ddp' where the base fits on one "
    "device"
)
BUCKET = 2**25  # bytes of gradients that are averaged at once


# --- what cannot be right is refused in setup ---


def prepare_fsdp1(strategy: Any) -> None:
    """Patch how an FSDPStrategy wraps and reduces gradients.

    Raises:
        LoRAError: its options cannot be used. The message says what to do.
    """
    module = getattr(strategy, "lightning_module", None)
    if module is not None and is_overridden("configure_sharded_model", module):
        raise LoRAError(
            "LoRACallback: configure_sharded_model wraps layers in FSDP1 so that the adapter would be laid into flat "
            "weights. Do what it does in configure_model, or leave it out: FSDPStrategy(auto_wrap_policy=...)."
        )
    for reason in _refused(getattr(strategy, "kwargs", {})):
        raise LoRAError(f"LoRACallback: FSDPStrategy cannot be used so: {reason}, or use {ALTERNATIVES}.")
    if is_patched(strategy, "_setup_model", _setup_model):
        return  # in an earlier stage
    patch(strategy, "_setup_model", _setup_model)
    patch(strategy, "model_sharded_context", _model_sharded_context)
    patch(strategy, "block_backward_sync", _block_backward_sync)


def _refused(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reason for each of FSDP1's options that cannot be used."""
    if not options.get("use_orig_params", True):
        yield "use_orig_params=False takes the weights out of their layers. Leave the option out"
    if options.get("ignored_modules") is not None:
        yield (
            "torch takes ignored_modules or ignored_states, and the adapter is passed in the second. Pass "
            "ignored_states=[*module.parameters()] instead"
        )


# --- the model is wrapped ---


class _Wrapping:
    """How FSDP1 wraps a LightningModule.

    Attributes:
        root: the outermost wrapper, which later stages take again.
        order: the names of each module's own parameters as they were registered. FSDP1 moves those of its flat tensors
            to the end, and the states of an optimizer are saved by the position of their parameter.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.root: Any = None
        self.order: dict[nn.Module, list[str]] = {}

    def outside(self) -> Iterator[nn.Parameter]:
        """Yield the parameters to leave outside of flat tensors, and note the order of all. FSDP1 is about to wrap."""
        for module in self.module.modules():
            self.order.setdefault(module, list(module._parameters))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad or names_factor(name):
                yield parameter

    def put_in_order_(self) -> None:
        """Register parameters in their old order. In place."""
        for module, names in self.order.items():
            for name in [each for each in names if each in module._parameters]:
                module._parameters[name] = module._parameters.pop(name)


class _Outside:
    """The parameters that stay outside of flat tensors, listed each time: configure_model may add some."""

    def __init__(self, wrapping: _Wrapping, given: Sequence[Any]) -> None:
        self.wrapping, self.given = wrapping, given

    def __iter__(self) -> Iterator[nn.Parameter]:
        found = dict.fromkeys(each for each in self.given if isinstance(each, nn.Parameter))
        for module in (each for each in self.given if isinstance(each, nn.Module)):
            found |= dict.fromkeys(module.parameters())
        yield from found | dict.fromkeys(self.wrapping.outside())


def _wrapping(strategy: Any) -> _Wrapping:
    module = strategy.lightning_module
    return cast(_Wrapping, vars(module).setdefault(WRAPPING, _Wrapping(module)))


@contextmanager
def _leaving_out(strategy: Any) -> Iterator[None]:
    """Let FSDP1 leave out of its flat tensors what is trained, inside the block."""
    given = strategy.kwargs.get("ignored_states")
    strategy.kwargs["ignored_states"] = _Outside(_wrapping(strategy), list(given or ()))
    try:
        yield
    finally:
        if given is None:
            del strategy.kwargs["ignored_states"]
        else:
            strategy.kwargs["ignored_states"] = given


@contextmanager
def _model_sharded_context(strategy: Any, previous: Callable[..., Any] | None) -> Iterator[None]:
    """Leave out what is trained where configure_model wraps parts itself: the patched model_sharded_context."""
    with _leaving_out(strategy), call_previous(strategy, previous, "model_sharded_context"):
        yield


def _setup_model(strategy: Any, previous: Callable[..., Any] | None, model: nn.Module) -> Any:
    """Wrap the model, or take the wrapper of an earlier stage; find the slices: the patched _setup_model.

    Lightning would wrap the model once more in each stage, and take the slices for whole weights.
    """
    module = strategy.lightning_module
    if find_model(module) is None and WRAPPING not in vars(module):  # the adapter may have been taken out since
        return call_previous(strategy, previous, "_setup_model", model)
    wrapping = _wrapping(strategy)
    is_new = wrapping.root is None
    if is_new:
        with _leaving_out(strategy):
            wrapping.root = call_previous(strategy, previous, "_setup_model", model)
    begin_writing(wrapping.root.modules(), "Trainer")  # after an exception it would use what it has gathered
    try:
        _attach(wrapping.root)
    except (AttributeError, ImportError) as error:
        raise LoRAError(
            f"LoRACallback: FSDPStrategy cannot be used with torch {torch.__version__}, in which FSDP1 is built in "
            f"another way than this version of lightning_lora knows. Use {ALTERNATIVES}, or an older torch."
        ) from error
    units = [unit for unit in _units(wrapping.root) if unit._handle is not None]
    inside = {id(parameter) for unit in units for parameter in unit._handle.flat_param._params}
    outside = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    if is_new:
        _start_alike_(outside, strategy.root_device)
    setattr(strategy, OUTSIDE, outside)
    setattr(strategy, UNITS, units)
    setattr(strategy, WHOLE, [unit for unit in units if not unit._handle.uses_sharded_strategy])
    patch(strategy.precision_plugin, "backward", _backward)
    patch(strategy.precision_plugin, "clip_grad_by_norm", _clip_grad_by_norm)
    wrapping.put_in_order_()  # last, because FSDP1 registers parameters anew
    return wrapping.root


def _start_alike_(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Move parameters that FSDP1 leaves out to its device, with the values of the first rank, as DDP does. In place."""
    for parameter in parameters:
        if parameter.is_meta:
            raise LoRAError(
                "LoRACallback: FSDPStrategy gives memory to frozen weights, and a trained parameter of shape "
                f"{tuple(parameter.shape)} is on the meta device. Build what is trained whole with memory, or use "
                f"{ALTERNATIVES}."
            )
        whole = parameter.data.to(device).contiguous()
        dist.broadcast(whole, 0)
        parameter.data = parameter.data.to(device).copy_(whole)


def _units(root: nn.Module) -> list[Any]:
    """Return the wrappers of FSDP1 in a model, the outermost first."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [module for module in root.modules() if isinstance(module, FullyShardedDataParallel)]


def _attach(root: nn.Module) -> None:
    """Tell how the slice of each original parameter is found, and how gathered memory is freed. In place."""
    from torch.distributed.fsdp._runtime_utils import _lazy_init

    for unit in _units(root):
        _lazy_init(unit, unit)  # from the outermost unit; a unit that began by itself would become a root
        handle, attached = unit._handle, _Unit(unit)
        inside = _parameters_inside(handle) if handle is not None else {}
        for owner in (unit, *inside):
            attach_owner(owner, attached, inside.get(owner, {}))
        if handle is not None and handle.uses_sharded_strategy:
            flat = handle.flat_param
            for parameter, info, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
                attach(parameter, partial(_find_slice, handle, info, shape))


def _parameters_inside(handle: Any) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Return the original parameters of a flat one, by the modules that own them and their names there."""
    flat = handle.flat_param
    places = [(info.module, info.param_name) for info in (*flat._param_infos, *flat._shared_param_infos)]
    inside: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for (owner, leaf), parameter in zip(places, (*flat._params, *flat._shared_params), strict=True):
        inside.setdefault(owner, {})[leaf] = parameter
    return inside


def _find_slice(handle: Any, info: Any, shape: torch.Size) -> FlatShard:
    """Return this rank's slice of a parameter of FSDP1."""
    own = handle.flat_param._local_shard.detach()
    start = info.intra_param_start_idx if info.in_shard else 0
    values = own.narrow(0, info.offset_in_shard, info.numel_in_shard) if info.in_shard else own[:0]
    return FlatShard(values, start, shape, handle.process_group, handle.device)


class _Unit:
    """A wrapper of FSDP1, whose gathered memory can be freed. FSDP1 keeps it in the root, or under SHARD_GRAD_OP."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def free(self) -> None:
        """Drop what was gathered, unless a forward or backward runs in this wrapper, and put the parameters back."""
        handle = self.wrapper._handle
        if handle is None or not self._is_idle():
            return
        if not handle.uses_sharded_strategy or not handle.needs_unshard():
            handle.reshard(handle.uses_sharded_strategy)  # without slices there is nothing to free
            handle.post_reshard()
            handle._prefetched = False

    def begin_writing(self, verb: str) -> None:
        """Let a backward of an earlier forward raise, as on one device, because slices are written now.

        Args:
            verb: the public function that the user called, for the message.

        Raises:
            LoRAError: a forward or backward runs, or an exception has ended one. It uses what it has gathered.
        """
        handle = self.wrapper._handle
        if handle is None:
            return
        if not self._is_idle():
            raise LoRAError(
                f"{verb}: the weights of {type(self.wrapper.module).__name__} cannot be changed while FSDP1 computes "
                "with them. Call it between steps, not inside a forward or backward; an evaluation with "
                "merged_eval=False changes none. After an exception in a forward build the model again."
            )
        torch.autograd.graph.increment_version(handle.flat_param)

    def end_backward(self) -> None:
        """Note that a backward has ended. torch does so only where it began at the outermost wrapper's outputs."""
        unit, handle = self.wrapper, self.wrapper._handle
        if handle._training_state.name.startswith("BACKWARD"):
            unit.training_state = type(unit.training_state).IDLE
            handle._training_state = type(handle._training_state).IDLE
            self.free()

    def _is_idle(self) -> bool:
        return all(each.name == "IDLE" for each in (self.wrapper.training_state, self.wrapper._handle._training_state))


# --- gradients ---


@contextmanager
def _block_backward_sync(strategy: Any, previous: Callable[..., Any] | None) -> Iterator[None]:
    """Average gradients once, after the last accumulated batch: the patched block_backward_sync."""
    before = getattr(strategy, LATER, False)
    setattr(strategy, LATER, True)
    try:
        with call_previous(strategy, previous, "block_backward_sync"):
            yield
    finally:
        setattr(strategy, LATER, before)


def _backward(
    plugin: Any, previous: Callable[..., Any] | None, tensor: Any, module: Any, *args: Any, **kw: Any
) -> None:
    """Average the gradients after backward: the patched backward of the precision plugin. Collective.

    Raises:
        LoRAError: as _refuse_unfrozen.
    """
    strategy = module.trainer.strategy
    _refuse_unfrozen(strategy)
    call_previous(plugin, previous, "backward", tensor, module, *args, **kw)
    for unit in getattr(strategy, UNITS):
        _Unit(unit).end_backward()
    for unit in getattr(strategy, WHOLE):  # FSDP1 leaves plain tensors in place of their frozen parameters
        _Unit(unit).free()
    if not getattr(strategy, LATER, False) and getattr(strategy.model, "_sync_gradients", True):
        average_gradients_(getattr(strategy, OUTSIDE))


def _refuse_unfrozen(strategy: Any) -> None:
    """Raise LoRAError where a weight in slices is to be trained: what is trained is whole in a checkpoint."""
    for unit in getattr(strategy, UNITS):
        if unit._handle.flat_param.requires_grad:
            raise LoRAError(
                "LoRACallback: a weight was unfrozen after FSDP1 had wrapped it. Unfreeze it before fit, or name its "
                "module in modules_to_save."
            )


def average_gradients_(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of whole parameters by their means over all ranks. In place. Collective.

    A gradient that some ranks lack counts as zero there, and one that all ranks lack stays away.
    """
    buckets: dict[tuple[torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            filled = buckets.setdefault((parameter.dtype, parameter.device), [[]])
            if sum(each.nbytes for each in filled[-1]) >= BUCKET:
                filled.append([])
            filled[-1].append(parameter)
    with torch.no_grad():
        for bucket in (each for filled in buckets.values() for each in filled):
            _average_bucket_(bucket)


def _average_bucket_(parameters: Sequence[nn.Parameter]) -> None:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = gradients[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat([there, *(gradient.reshape(-1) for gradient in gradients)])
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    found, *means = torch.split(flat, [len(parameters), *(p.numel() for p in parameters)])
    lacks = any(p.grad is None for p in parameters)
    shares = found.tolist() if lacks else [1.0] * len(parameters)  # to read them, a GPU would be waited for
    for parameter, gradient, mean, share in zip(parameters, gradients, means, shares, strict=True):
        if share:
            gradient.copy_(mean.view(gradient.shape))
            parameter.grad = gradient


def _clip_grad_by_norm(plugin: Any, previous: Any, optimizer: Any, clip_val: float | int, *args: Any) -> None:
    """Clip by the norm over whole gradients, which Lightning refuses to do: the patched clip_grad_by_norm."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_val)
