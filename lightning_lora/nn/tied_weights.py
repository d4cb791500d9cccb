"""Weights that several modules own: merging one of them would change the others too."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from ..names import ATTRIBUTE
from .lora_layer import AdaptedModule, layer_adapter


def tied_weights(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that own one of tied_parameters, each with the name of the other parameter or buffer."""
    tied: dict[nn.Module, str] = {}
    for (module, _), other in tied_parameters(model).items():
        tied.setdefault(module, other)
    return tied


def tied_parameters(model: nn.Module) -> dict[tuple[nn.Module, str], str]:
    """Return the weights, by module and name in it, that share memory with another module's tensor, and its name.

    Memory counts, not identity: two Parameters may view one storage. A bias may have several owners. Modules that share
    an adapter count as one.
    """
    owners: dict[int, list[tuple[torch.Tensor, nn.Module, str, bool]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for tensors, trains in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    is_weight = trains and not name.endswith("bias")
                    owners[_storage(tensor)].append((tensor, module, f"{prefix}.{name}".lstrip("."), is_weight))
    tied: dict[tuple[nn.Module, str], str] = {}
    for sharing in owners.values():
        if len(sharing) > 1:  # rare
            _add_overlaps(sharing, tied)
    return tied


def record_ties(model: nn.Module) -> None:
    """Record on each adapted layer and parameter what keeps it from being merged, if anything."""
    ties: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    for (module, name), other in tied_parameters(model).items():
        ties[module][name] = other
    modules = list(model.modules())
    whole = any(ATTRIBUTE in vars(module) for module in modules)
    for module in modules:
        for parameter, adapter in module.lora_adapters().items() if isinstance(module, AdaptedModule) else ():
            own = ties.get(module, {})
            owner = own.get(parameter) if parameter else next(iter(own.values()), None)
            reason = f"its weight is also {owner}" if owner else ""
            weights = (parameter,) if parameter else adapter.adapted_weights()
            if not owner and any(name not in module._parameters for name in weights):
                reason = "its weight is computed from others (weight_norm, parametrize, prune)"
            # A part of the injected model shows what ties a layer, but not that nothing does.
            if reason != adapter.lora.unmergeable_reason and (reason or whole):
                adapter.lora.unmergeable_reason = reason


def _add_overlaps(
    sharing: list[tuple[torch.Tensor, nn.Module, str, bool]], tied: dict[tuple[nn.Module, str], str]
) -> None:
    """Add to `tied` the weights among the owners of one storage that overlap with another module's tensor."""
    spans = [(*_span(tensor), module, name, is_weight) for tensor, module, name, is_weight in sharing]
    spans.sort(key=lambda span: span[:2])
    for i, (_, end, module, name, is_weight) in enumerate(spans):
        for start, _, later_module, later_name, later_is_weight in spans[i + 1 :]:
            if start >= end:
                break
            if _owner(later_module) is _owner(module):
                continue
            if is_weight:
                tied.setdefault((module, name.rpartition(".")[2]), later_name)
            if later_is_weight:
                tied.setdefault((later_module, later_name.rpartition(".")[2]), name)


def _owner(module: nn.Module) -> object:
    """What a module's tensors belong to: its adapter, which other modules may share, or the module."""
    return layer_adapter(module) or module


def _storage(tensor: torch.Tensor) -> int:
    """The memory that a tensor is a view of; one without memory of its own (meta, sharded) counts by identity."""
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else id(tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte in that memory."""
    if not _has_memory(tensor):
        return 0, 1
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _has_memory(tensor: torch.Tensor) -> bool:
    dense = tensor.layout is torch.strided and tensor.device.type != "meta" and type(tensor.data) is torch.Tensor
    return dense and tensor.numel() > 0
