"""What "all-linear" passes over in a model: which kinds of weights, and what share of the parameters each one is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import nn

from ..names import around, canonical, matcher
from ..nn.layer_kinds import layer_class
from ..nn.lora_layer import AdaptedModule, LoRALayer, Swapped, is_factor
from ..nn.quantised import shape_of
from .injection import Injection
from .named_state import base_parameters

MOST_KINDS, LEAST_SHARE = 6, 0.0005  # of which each is told
# Of a foreign class with such a name, the module is told.
NAMES_OF_LAYERS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention")


def describe_passed_over(root: nn.Module, record: Injection, saved: Collection[str]) -> str:
    """Return what share of the parameters is passed over, and of which kinds of weights.

    It is "" where as good as every weight is adapted, trained, excluded or named.

    Parameters of one dimension (biases, norms) are no weights.

    Args:
        root: the injected module.
        record: of its injection; layers that left_out names one by one are no part of it.
        saved: the names of the modules that are trained whole.
    """
    excluded = matcher(record.config.exclude_modules)
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    single: dict[str, None] = {}  # names of parameters that can be adapted by themselves
    for raw_name, module in root.named_modules():
        name = canonical(raw_name)
        if isinstance(module, LoRALayer) or name in record.left_out or excluded(name):
            continue
        if not set(saved).isdisjoint((name, *around(name))):
            continue
        kinds = set()
        adapted = module.lora_adapters() if isinstance(module, AdaptedModule) else ()
        for leaf, parameter in module._parameters.items():
            if leaf in adapted or is_factor(leaf, module):
                continue
            if parameter is not None and parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                kind = _kind(module, leaf)
                sizes[kind] += shape_of(parameter).numel()
                if (parameter.dim() == 3 or isinstance(module, nn.RNNBase)) and leaf != "weight":
                    single[leaf] = None
                kinds.add(kind)
        counts.update(kinds)
    total = sum(shape_of(parameter).numel() for parameter in base_parameters(root).values())
    large = [(kind, size) for kind, size in sizes.most_common(MOST_KINDS) if size / total > LEAST_SHARE]
    if not large:
        return ""
    shown = [f"{counts[kind]} {kind} {size / total:.1%}" for kind, size in large]
    others = (sum(sizes.values()) - sum(size for _, size in large)) / total
    shown += [f"others {others:.1%}"] if others > LEAST_SHARE else []
    hint = f"; target_parameters={list(single)} adapts what is no layer" if single else ""
    return f"{sum(sizes.values()) / total:.1%} of the parameters: {', '.join(shown)}{hint}"


def _kind(module: nn.Module, leaf: str) -> str:
    cls = module.lora_base if isinstance(module, Swapped) else type(module)
    if isinstance(module, nn.MultiheadAttention):
        return f"{cls.__name__}.in_proj"
    if layer_class(module) is None and cls.__name__ in NAMES_OF_LAYERS:
        return f"{cls.__module__}.{cls.__name__}"
    return cls.__name__ if leaf == "weight" or isinstance(module, nn.RNNBase) else f"{cls.__name__}.{leaf}"
