"""FSDPStrategy (FSDP1): each rank keeps a slice of each frozen weight, and the whole of all that is trained.

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

from ..distributed.flat import FlatShard, begin_writing, mark_as_flat, note_owner
from ..errors import LoRAError
from ..model.adapted_model import find_adapted
from ..model.patches import call_previous, is_patched, patch
from ..names import names_factor
from ..private.lightning import SET_UP_FSDP
from ..private.torch import FSDP1Unit, averages_now
from .lightning_packages import is_overridden

WRAPPING = "lora_fsdp_wrapping"  # attribute of a LightningModule: its _Wrapping
OUTSIDE = "lora_outside"  # attribute of a strategy: the parameters outside of the flat tensors
UNITS = "lora_units"  # attribute of a strategy: the wrappers with weights, as FSDP1Unit
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
    if is_patched(strategy, SET_UP_FSDP, _setup_model):
        return  # in an earlier stage
    patch(strategy, SET_UP_FSDP, _setup_model)
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
    """Wrap the model, or take the wrapper of an earlier stage; find the slices: FSDPStrategy's patched method.

    Lightning would wrap the model once more in each stage, and take the slices for whole weights.
    """
    module = strategy.lightning_module
    if find_adapted(module) is None and WRAPPING not in vars(module):  # the adapter may have been taken out since
        return call_previous(strategy, previous, SET_UP_FSDP, model)
    wrapping = _wrapping(strategy)
    is_new = wrapping.root is None
    if is_new:
        with _leaving_out(strategy):
            wrapping.root = call_previous(strategy, previous, SET_UP_FSDP, model)
    begin_writing(wrapping.root.modules(), "Trainer")  # after an exception it would use what it has gathered
    try:
        units = [unit for unit in _mark_flat_parameters(wrapping.root) if unit.handle is not None]
    except (AttributeError, ImportError) as error:
        raise LoRAError(
            f"LoRACallback: FSDPStrategy cannot be used with torch {torch.__version__}, in which FSDP1 is built in "
            f"another way than this version of lightning_lora knows. Use {ALTERNATIVES}, or an older torch."
        ) from error
    inside = {id(parameter) for unit in units for own in unit.inside().values() for parameter in own.values()}
    outside = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    if is_new:
        _start_alike_(outside, strategy.root_device)
    setattr(strategy, OUTSIDE, outside)
    setattr(strategy, UNITS, units)
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
                f"{tuple(parameter.shape)} is on the meta device. Build fully trained modules with memory, or use "
                f"{ALTERNATIVES}."
            )
        whole = parameter.data.to(device).contiguous()
        dist.broadcast(whole, 0)
        parameter.data = parameter.data.to(device).copy_(whole)


def _mark_flat_parameters(root: nn.Module) -> list[FSDP1Unit]:
    """Return FSDP1's wrappers in a model, the outermost first, and note on parameters and modules what they hold.

    Each parameter of a unit knows how its slice is found, and each module who frees memory that was gathered for it.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = [FSDP1Unit(module) for module in root.modules() if isinstance(module, FullyShardedDataParallel)]
    for unit in units:
        note_owner(unit.wrapper, unit, {})
        for owner, parameters in unit.inside().items():
            note_owner(owner, unit, parameters)
        for parameter, find in unit.slices():
            mark_as_flat(parameter, partial(_flat_shard, find))
    return units


def _flat_shard(find: Callable[[], tuple[Any, ...]]) -> FlatShard:
    return FlatShard(*find())


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
        LoRAError: a weight in slices is to be trained.
    """
    strategy = module.trainer.strategy
    if any(unit.is_trained() for unit in getattr(strategy, UNITS)):
        raise LoRAError(  # what is trained is whole in a checkpoint
            "LoRACallback: a weight was unfrozen after FSDP1 had wrapped it. Unfreeze it before fit, or name its "
            "module in modules_to_save."
        )
    call_previous(plugin, previous, "backward", tensor, module, *args, **kw)
    for unit in getattr(strategy, UNITS):
        unit.end_backward()
        if not unit.is_divided:  # FSDP1 leaves plain tensors in place of its frozen parameters
            unit.free()
    if not getattr(strategy, LATER, False) and averages_now(strategy.model):
        average_gradients_(getattr(strategy, OUTSIDE))


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
