"""Describe what "all-linear" or "all-layers" passes over in a model: kinds of weights, and their shares."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from ..matching import ALL_LAYERS, ALL_LINEAR, matcher
from ..names import listed, parent_names
from ..nn.adapted_module import Swapped, is_factor
from ..nn.adapted_weights import adapters_in
from ..nn.layer_kinds import layer_class
from ..nn.lora_layer import LoRALayer
from ..nn.low_rank import MERGEABLE_DTYPES
from ..nn.quantised import shape_of
from ..nn.variant import variant_of
from .adapted_model import AdaptedModel
from .injection import Due, Injection
from .layers_by_kind import more_layers

MOST_KINDS, LEAST_SHARE = 6, 0.0005  # kinds that a message names, and the least share of such a kind
LITTLE = 0.1  # a share up to this is told on request only
NEARLY_ALL = 0.9  # a larger share is probably a mistake
# Another library's class with one of these names is shown with its module path.
NAMES_OF_LAYERS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention")


def describe_passed_over(handle: AdaptedModel, saved: Collection[str]) -> tuple[str, Due]:
    """Describe the weights that "all-linear" or "all-layers" passes over.

    Vectors (biases, norms, scales of layers, a class token) are no weights, however many dimensions they have. Layers
    that are left out by name are not counted.

    Args:
        handle: of an injected model.
        saved: the names of the modules that are trained whole.

    Returns:
        The share of the parameters that is passed over with its kinds of weights, or "" where it is next to nothing;
        and how to say so: as a warning where it is nearly all of the model and some of it could be adapted by name, in
        a line where it is more than a little, else only on request.
    """
    found = _gather(handle, saved)
    total = sum(shape_of(each.parameter).numel() for each in handle.base())
    large = [(kind, size) for kind, size in found.sizes.most_common(MOST_KINDS) if size / total > LEAST_SHARE]
    if not large:
        return "", ""
    shown = [f"{found.counts[kind]} {kind} {size / total:.1%}" for kind, size in large]
    whole = sum(found.sizes.values())
    others = (whole - sum(size for _, size in large)) / total
    shown += [f"others {others:.1%}"] if others > LEAST_SHARE else []
    hint = f"; target_parameters={list(found.single)} adapts these too" if found.single else ""
    nearly_all = whole > NEARLY_ALL * total
    sizes = found.sizes.most_common()
    by_all_layers = [kind for kind, size in sizes if kind in found.by_all_layers and size / total > LEAST_SHARE]
    if by_all_layers:
        hint += f"; target_modules={ALL_LAYERS!r} adapts {listed(by_all_layers, MOST_KINDS)} too"
    examples = {kind: name for kind, name in found.examples.items() if kind not in found.by_all_layers}
    layers = [f"{kind} ({examples[kind]!r}, ...)" for kind, _ in large if kind in examples]
    if nearly_all and layers:
        hint += f"; a list of target_modules can name {' and '.join(layers)} too, and exclude_modules what is to stay"
    due: Due = "warning" if nearly_all and hint else "line" if whole > LITTLE * total else ""
    return f"{whole / total:.1%} of the parameters: {', '.join(shown)}{hint}", due


@dataclass
class _Found:
    """The weights that are passed over, by kind: a class, and the parameter's name where it is not "weight"."""

    sizes: Counter[str] = field(default_factory=Counter)  # parameters of each kind
    counts: Counter[str] = field(default_factory=Counter)  # modules of each kind
    single: dict[str, None] = field(default_factory=dict)  # names of parameters that target_parameters can adapt
    examples: dict[str, str] = field(default_factory=dict)  # the first layer of each kind that can be adapted by name
    by_all_layers: dict[str, None] = field(default_factory=dict)  # kinds of which "all-layers" adapts some


def _gather(handle: AdaptedModel, saved: Collection[str]) -> _Found:
    """Find the weights that are passed over, each once."""
    record, left_out = handle.record, handle.left_out()
    excluded, found = matcher(record.config.exclude_modules), _Found()
    is_all_linear = record.config.target_modules == ALL_LINEAR
    more = set(more_layers(handle.root_modules, record.config) if is_all_linear else ())
    seen: set[int] = set()
    for name, module in handle.root_modules:
        if isinstance(module, LoRALayer) or name in left_out or excluded(name):
            continue
        if not set(saved).isdisjoint((name, *parent_names(name))):
            continue
        kinds = set()
        adapted = adapters_in(module)
        for leaf, parameter in module._parameters.items():
            if leaf in adapted or is_factor(leaf, module):
                continue
            if parameter is not None and is_matrix(parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                kind = _kind(module, leaf)
                found.sizes[kind] += shape_of(parameter).numel()
                is_stack = parameter.dim() == 3 and len(parameter) > 1  # no (1, positions, width)
                is_single = (is_stack or isinstance(module, nn.RNNBase)) and leaf != "weight"
                if is_single and parameter.dtype in MERGEABLE_DTYPES:
                    found.single[leaf] = None
                if name in more:
                    found.by_all_layers[kind] = None
                elif layer_class(module, variant_of(record.config)):
                    found.examples.setdefault(kind, name)
                kinds.add(kind)
        found.counts.update(kinds)
    return found


def warn_of_passed_over(record: Injection) -> None:
    """Warn once of a model nearly all of which is passed over."""
    if record.passed_over_due == "warning":
        record.passed_over_due = ""
        warnings.warn(
            f"lightning_lora: {record.config.target_modules!r} passes over {record.passed_over}.", stacklevel=4
        )


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether at least two dimensions of a parameter are larger than 1."""
    return sum(size > 1 for size in shape_of(parameter)) > 1


def _kind(module: nn.Module, leaf: str) -> str:
    """Return the kind of a module's own parameter, for messages."""
    cls = module.lora_base if isinstance(module, Swapped) else type(module)
    if isinstance(module, nn.MultiheadAttention):
        return f"{cls.__name__}.in_proj"
    if layer_class(module) is None and cls.__name__ in NAMES_OF_LAYERS:
        return f"{cls.__module__}.{cls.__name__}"
    return cls.__name__ if leaf == "weight" or isinstance(module, nn.RNNBase) else f"{cls.__name__}.{leaf}"
