"""Weights that several modules own. Merging such a weight for one module would change the others too."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from ..distributed.sharding import PLAIN_TYPES
from ..names import INJECTION_ATTRIBUTE, join_names
from .adapted_module import AdaptedModule, NamedModules, adapters_in, layer_adapter

Owned = tuple[torch.Tensor, nn.Module, str, str, bool]  # tensor, module, module's name, leaf name, is a parameter


def tied_weights(modules: NamedModules) -> dict[nn.Module, str]:
    """Return the modules with a tied parameter, each with the name of another parameter or buffer that shares it."""
    tied: dict[nn.Module, str] = {}
    for (module, _), other in tied_parameters(modules).items():
        tied.setdefault(module, other)
    return tied


def tied_parameters(modules: NamedModules) -> dict[tuple[nn.Module, str], str]:
    """Return the parameters that share memory with a tensor of another module.

    Memory counts and not identity, because two Parameters may view one storage. A bias may have several owners. Modules
    that share an adapter count as one.

    Returns:
        Name of the other tensor, by (module, name of the parameter in the module).
    """
    owners: dict[int, list[Owned]] = defaultdict(list)
    for path, module in modules:
        parameters = dict(module._parameters)
        for adapter in adapters_in(module).values():
            with adapter.lora.lock:  # waits while W' stands in for the weight in another thread's forward
                parameters[adapter.weight_leaf] = module._parameters.get(adapter.weight_leaf)
        for tensors, trains in ((parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    # Tensors without readable memory (meta, sharded) are told apart by identity.
                    storage = tensor.untyped_storage().data_ptr() if _is_dense(tensor) else 0
                    owners[storage or id(tensor)].append((tensor, module, path, name, trains))
    tied: dict[tuple[nn.Module, str], str] = {}
    for sharing in owners.values():
        if len(sharing) == 1:  # nearly always
            continue
        spans: list[tuple[int, int, nn.Module, str, str, bool]] = []
        for tensor, module, path, name, trains in sharing:
            first, end = 0, 1
            if _is_dense(tensor) and not tensor.is_meta and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                first = tensor.data_ptr()
                end = first + (last + 1) * tensor.element_size()
            spans.append((first, end, module, path, name, trains))
        spans.sort(key=lambda span: span[:2])  # by address: a span overlaps with those that begin before its end
        for i, (_, end, module, path, name, trains) in enumerate(spans):
            for start, _, later_module, later_path, later_name, later_trains in spans[i + 1 :]:
                if start >= end:
                    break
                if _owner(later_module) is _owner(module):
                    continue
                if trains and not name.endswith("bias"):
                    tied.setdefault((module, name), join_names(later_path, later_name))
                if later_trains and not later_name.endswith("bias"):
                    tied.setdefault((later_module, later_name), join_names(path, name))
    return tied


def record_ties(modules: NamedModules) -> None:
    """Record on each adapter of a model why its weight cannot be merged, or that it can. In place.

    Args:
        modules: every module of the model, under its first name.
    """
    ties: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    for (module, name), other in tied_parameters(modules).items():
        ties[module][name] = other
    whole = any(INJECTION_ATTRIBUTE in vars(module) for _, module in modules)
    for _, module in modules:
        for parameter, adapter in adapters_in(module).items() if isinstance(module, AdaptedModule) else ():
            own = ties.get(module, {})
            owner = own.get(parameter) if parameter else next(iter(own.values()), None)
            reason = f"its weight is also {owner}" if owner else ""
            if not owner and adapter.weight_leaf not in module._parameters:
                reason = "its weight is computed from others (weight_norm, parametrize, prune)"
            # If `modules` are only a part of the injected model, they can show a tie but not that there is none.
            if reason != adapter.lora.why_not_merge and (reason or whole):
                adapter.lora.why_not_merge = reason


def _owner(module: nn.Module) -> object:
    """Return the module's adapter, which other modules may share, or the module if it has none."""
    return layer_adapter(module) or module


def _is_dense(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in PLAIN_TYPES or type(tensor.data) is torch.Tensor  # the second check takes longer
    return plain and tensor.layout is torch.strided


def untie_advice(name: str) -> str:
    """Return the sentence that says how to untie a parameter."""
    return f"Untie it first, which is exact: model.{name} = nn.Parameter(model.{name}.detach().clone())"
