"""Find the network inside the wrappers of torch and Lightning. Every public function acts on that network.

A wrapper runs a module and adds nothing that is trained, but its names of the weights differ, as `module.0.weight`. A
LightningModule is no wrapper, and neither is a user's module that calls the network.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from ..distributed.flat import owns_flat
from ..distributed.sharding import is_spread
from ..errors import LoRAError
from ..names import (
    CHECKPOINTED,
    COMPILED,
    FLATTENED,
    LIGHTNING,
    WRAPPERS,
    derives_from,
    names_factor,
)

TORCH = ("torch",)
INSIDE = {  # by class of wrapper: the packages that define it, and the attribute with the module inside
    "OptimizedModule": (TORCH, COMPILED),
    "CheckpointWrapper": (TORCH, CHECKPOINTED),
    "DistributedDataParallel": (TORCH, "module"),
    "DataParallel": (TORCH, "module"),
    "AveragedModel": (TORCH, "module"),
    "_FabricModule": (LIGHTNING, "_original_module"),
}
FORWARD = "_forward_module"  # the attribute of Fabric's wrapper with what it runs
FLAT = "FullyShardedDataParallel"
ENGINE = "DeepSpeedEngine"
READ_NO_VALUES = ("disable_adapter", "is_merged")  # functions that are right with parameters in any form
DIVIDED = {  # by an attribute that a strategy gives to parameters which it divides: its package, and its name
    "_fsdp_flattened": ("torch.distributed.fsdp", "FSDP1"),
    "ds_tensor": ("deepspeed", "DeepSpeed's stage 3"),
}


def unwrapped(model: nn.Module, verb: str) -> nn.Module:
    """Return the module inside all wrappers, or the model itself where there is no wrapper.

    Raises:
        LoRAError: a strategy that cannot be followed has divided the adapter. The message begins with the verb.
    """
    network = inside_known_wrappers(model)
    if verb not in READ_NO_VALUES:
        _refuse_divided(model, network, verb)
    return network


def inside_known_wrappers(model: nn.Module) -> nn.Module:
    """Return the module inside all wrappers of known classes, or the model itself where there is none."""
    return list(_layers_of_wrapping(model))[-1]


def wrapped_attribute(model: nn.Module) -> str:
    """Return the attribute in which a known wrapper holds the module inside, or "" for any other module."""
    if FLATTENED in model._modules and owns_flat(model):
        return FLATTENED
    for name, (packages, attribute) in INSIDE.items():
        if attribute in model._modules and derives_from(model, name, packages):
            return attribute
    return ""


def prefix_inside(model: nn.Module) -> str:
    """Return the name of the module inside all wrappers in the outermost wrapper, ending in a dot; "" without any."""
    attributes = [wrapped_attribute(wrapper) for wrapper in _layers_of_wrapping(model)]
    return "".join(f"{attribute}." for attribute in attributes if attribute and attribute not in WRAPPERS)


def warn_of_late_adapters(model: nn.Module, verb: str) -> None:
    """Warn where a module is about to be adapted inside DistributedDataParallel, which would not synchronise it."""
    wrappers = list(_layers_of_wrapping(model))
    for run in [wrapper._modules.get(FORWARD) for wrapper in wrappers]:  # the place where Fabric has DDP
        wrappers.extend(_layers_of_wrapping(run) if run is not None else ())
    if any(derives_from(wrapper, "DistributedDataParallel", TORCH) for wrapper in wrappers):
        warnings.warn(
            f"lightning_lora: {verb}: DistributedDataParallel was put around the model before it was adapted, and does "
            "not synchronise the adapters in training; adapt the model first, then wrap it.",
            stacklevel=3,
        )


def refuse_trained_copies(model: nn.Module, verb: str) -> None:
    """Refuse to write an adapter inside Fabric's wrapper of DeepSpeed, which trains copies that are not reached.

    A Trainer with LoRACallback tells where they are.

    Raises:
        LoRAError: DeepSpeed runs the model.
    """
    if _runs_in_engine(model):
        raise LoRAError(
            f"{verb}: DeepSpeed trains copies of the adapter, and would write them over what is loaded in its next "
            f"step. Call {verb} before fabric.setup."
        )


def _runs_in_engine(model: nn.Module) -> bool:
    """Return whether DeepSpeed runs a model in Fabric, where this package follows no engine."""
    runs = [wrapper._modules.get(FORWARD) for wrapper in _layers_of_wrapping(model)]
    return any(derives_from(each, ENGINE, ("deepspeed",)) for each in runs if each is not None)


def _refuse_divided(model: nn.Module, network: nn.Module, verb: str) -> None:
    """Refuse a model whose adapter a strategy has divided, if the package was not told how.

    Such a strategy divides all parameters of a model. So the first parameter of an adapter tells it.
    """
    if derives_from(network, FLAT, TORCH):
        raise LoRAError(
            f"{verb}: {type(network).__name__} (FSDP1) has put the adapter into flat buffers, together with the "
            "weights. Let a Trainer with LoRACallback and FSDPStrategy wrap the model, use fully_shard (FSDP2), or "
            "pass a module that is not wrapped."
        )
    if not (dist.is_available() and dist.is_initialized()):
        return
    marks = [mark for mark, (package, _) in DIVIDED.items() if package in sys.modules]
    factor = next((p for name, p in network.named_parameters() if names_factor(name)), None) if marks else None
    for mark in marks:
        if hasattr(factor, mark) and (not is_spread(factor) or _runs_in_engine(model)):
            raise LoRAError(
                f"{verb}: {DIVIDED[mark][1]} has divided the adapter, together with the weights, without LoRACallback. "
                "Let a Trainer with LoRACallback use that strategy, or use fully_shard (FSDP2), in Fabric by "
                "ModelParallelStrategy."
            )


def _layers_of_wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, the module that it wraps, and so on to the innermost."""
    yield model
    while attribute := wrapped_attribute(model):
        model = model._modules[attribute]  # type: ignore[assignment]
        yield model
