"""What torch and Lightning wrap around a network to run it. Every public function acts on the network inside.

A wrapper runs a module and adds nothing to what is trained, but has names of its own for the weights, as
`module.0.weight`, or two for each. A LightningModule, or a user's module that calls the network, is none of these.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from ..arguments import require_module
from ..errors import LoRAError
from ..names import ATTRIBUTE, CHECKPOINTED, COMPILED, KEPT, LIGHTNING, WRAPPERS, derives_from, is_lightning_module

TORCH = ("torch",)
INSIDE = {  # the class of a wrapper, the packages that it comes from, and the attribute with the module inside
    "OptimizedModule": (TORCH, COMPILED),
    "CheckpointWrapper": (TORCH, CHECKPOINTED),
    "DistributedDataParallel": (TORCH, "module"),
    "DataParallel": (TORCH, "module"),
    "AveragedModel": (TORCH, "module"),
    "_FabricModule": (LIGHTNING, "_original_module"),
}
FLAT = "FullyShardedDataParallel"


def unwrapped(model: nn.Module, verb: str) -> nn.Module:
    """Return the module inside all wrappers around it, or the model itself.

    Raises:
        LoRAError: it is no module, or a wrapper is of an unknown class; the message begins with the verb.
    """
    require_module(model, verb)
    network = inside_known_wrappers(model)
    if ATTRIBUTE not in vars(network):
        _refuse_unknown_wrapper(network, verb)
    return network


def inside_known_wrappers(model: nn.Module) -> nn.Module:
    """Return the module inside all wrappers of known classes around it, or the model itself."""
    return list(_layers_of_wrapping(model))[-1]


def wrapped_attribute(model: nn.Module) -> str:
    """Return the attribute of a known wrapper that holds the module inside; '' for any other module."""
    for name, (packages, attribute) in INSIDE.items():
        if attribute in model._modules and derives_from(model, name, packages):
            return attribute
    return ""


def prefix_inside(model: nn.Module) -> str:
    """Return what names in a module have before those of the module inside all wrappers, "" or ending in a dot."""
    attributes = [wrapped_attribute(wrapper) for wrapper in _layers_of_wrapping(model)]
    return "".join(f"{attribute}." for attribute in attributes if attribute and attribute not in WRAPPERS)


def warn_of_late_adapters(model: nn.Module, verb: str) -> None:
    """Warn where a module is about to be adapted inside of one that has registered what it synchronises."""
    if any(derives_from(wrapper, "DistributedDataParallel", TORCH) for wrapper in _layers_of_wrapping(model)):
        warnings.warn(
            f"lightning_lora: {verb}: DistributedDataParallel was put around the model before it was adapted, and does "
            "not synchronise the adapters in training; adapt the model first, then wrap it.",
            stacklevel=3,
        )


def _layers_of_wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, what it is known to wrap, and so on."""
    yield model
    while attribute := wrapped_attribute(model):
        model = model._modules[attribute]  # type: ignore[assignment]
        yield model


def _refuse_unknown_wrapper(model: nn.Module, verb: str) -> None:
    """Refuse a module that has nothing but another, under a wrapper's name, and is no part of what was injected."""
    kind = type(model).__name__
    if derives_from(model, FLAT, TORCH):
        raise LoRAError(
            f"{verb}: {kind} (FSDP1) keeps weights as pieces of flat buffers, which hold no adapted layer. Use "
            "fully_shard (FSDP2), or pass a module that is not wrapped in it."
        )
    children = {name: child for name, child in model._modules.items() if child is not None}
    if model._parameters or model._buffers or not children or is_lightning_module(model):
        return
    networks = {inside_known_wrappers(child) for child in children.values()}
    twice = len(networks) == 1 < len(set(children.values()))  # the same module, as it is and in a wrapper
    if not twice and list(children) != ["module"]:
        return
    if KEPT not in vars(model) and any(KEPT in vars(network) for network in networks):  # it came after injection
        raise LoRAError(
            f"{verb}: {kind} is a wrapper of an unknown kind: it holds nothing but {' and '.join(children)}, "
            "and its names of the weights are not those of the network that was injected. Pass the network inside."
        )
