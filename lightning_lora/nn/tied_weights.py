"""Weights that several modules own: merging one of them would change the others too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..distributed.sharding import PLAIN
from ..names import ATTRIBUTE
from .adapted_module import AdaptedModule
from .adapted_weights import NamedModules, adapters_in, layer_adapter

Owned = tuple[torch.Tensor, nn.Module, str, str, bool]  # tensor, module, its name, that in it, and if it is a parameter


def tied_weights(modules: NamedModules) -> dict[nn.Module, str]:
    """Return the modules that own one of tied_parameters, each with the name of the other parameter or buffer."""
    tied: dict[nn.Module, str] = {}
    for (module, _), other in tied_parameters(modules).items():
        tied.setdefault(module, other)
    return tied


def tied_parameters(modules: NamedModules) -> dict[tuple[nn.Module, str], str]:
    """Return the weights, by module and name in it, that share memory with another module's tensor, and its name.

    Memory counts, not identity: two Parameters may view one storage. A bias may have several owners. Modules that share
    an adapter count as one.
    """
    owners: dict[int, list[Owned]] = defaultdict(list)
    for path, module in modules:
        for tensors, trains in ((_own_parameters(module), True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    owners[_storage(tensor)].append((tensor, module, path, name, trains))
    tied: dict[tuple[nn.Module, str], str] = {}
    for sharing in owners.values():
        if len(sharing) > 1:  # rare
            _add_overlaps(sharing, tied)
    return tied


def record_ties(modules: NamedModules) -> None:
    """Record on each adapted layer and parameter of a model what keeps it from being merged, if anything.

    Args:
        modules: every module of the model, under its first name.
    """
    ties: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    for (module, name), other in tied_parameters(modules).items():
        ties[module][name] = other
    whole = any(ATTRIBUTE in vars(module) for _, module in modules)
    for _, module in modules:
        for parameter, adapter in adapters_in(module).items() if isinstance(module, AdaptedModule) else ():
            own = ties.get(module, {})
            owner = own.get(parameter) if parameter else next(iter(own.values()), None)
            reason = f"its weight is also {owner}" if owner else ""
            weights = (parameter,) if parameter else adapter.adapted_weights()
            if not owner and any(name not in module._parameters for name in weights):
                reason = "its weight is computed from others (weight_norm, parametrize, prune)"
            # A part of the injected model shows what ties a layer, but not that nothing does.
            if reason != adapter.lora.unmergeable_reason and (reason or whole):
                adapter.lora.unmergeable_reason = reason


def _own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return the parameters of a module, and not what stands in for one in another thread's forward.

    What all adapted layers share is left out: it is no tie.
    """
    if not isinstance(module, AdaptedModule):
        return module._parameters
    adapters = list(module.lora_adapters().values())
    if len(adapters) == 1:  # a stack of locks takes longer
        with adapters[0].lora.lock:
            parameters = dict(module._parameters)
    else:
        with ExitStack() as stack:
            for adapter in adapters:
                stack.enter_context(adapter.lora.lock)
            parameters = dict(module._parameters)
    for adapter in adapters:
        for leaf in adapter.lora.spec.variant.shared if adapter.lora.shared is not None else ():
            parameters.pop(adapter.stored_name(leaf), None)
    return parameters


def _add_overlaps(sharing: Sequence[Owned], tied: dict[tuple[nn.Module, str], str]) -> None:
    """Add to `tied` the weights among the owners of one storage that overlap with another module's tensor."""
    spans = sorted(((*_span(owned[0]), *owned[1:]) for owned in sharing), key=lambda span: span[:2])
    for i, (_, end, module, path, name, trains) in enumerate(spans):
        for start, _, later_module, later_path, later_name, later_trains in spans[i + 1 :]:
            if start >= end:
                break
            if _owner(later_module) is _owner(module):
                continue
            if trains and not name.endswith("bias"):
                tied.setdefault((module, name), f"{later_path}.{later_name}".lstrip("."))
            if later_trains and not later_name.endswith("bias"):
                tied.setdefault((later_module, later_name), f"{path}.{name}".lstrip("."))


def _owner(module: nn.Module) -> object:
    """What a module's tensors belong to: its adapter, which other modules may share, or the module."""
    return layer_adapter(module) or module


def _storage(tensor: torch.Tensor) -> int:
    """The memory that a tensor is a view of; one without memory of its own (meta, sharded) counts by identity."""
    return (tensor.untyped_storage().data_ptr() if _is_dense(tensor) else 0) or id(tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte in that memory."""
    if not _is_dense(tensor) or tensor.is_meta or not tensor.numel():
        return 0, 1
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _is_dense(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in PLAIN or type(tensor.data) is torch.Tensor  # the second takes longer
    return plain and tensor.layout is torch.strided
