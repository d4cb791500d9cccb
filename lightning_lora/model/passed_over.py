"""Say what "all-linear" or "all-layers" passes over in a model."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ..matching import ALL_LAYERS, ALL_LINEAR, BY_KIND, matcher
from ..names import parent_names
from ..nn.adapted_module import Swapped
from ..nn.adapted_weights import adapters_in
from ..nn.quantised import shape_of
from .adapted_model import AdaptedModel
from .layers_by_kind import MORE_KINDS

LITTLE, MOST_KINDS = 0.1, 3  # a share up to this is not told; how many kinds are


def passed_over(handle: AdaptedModel) -> str:
    """Return the share of the parameters that "all-linear" or "all-layers" passes over, and its largest kinds.

    Vectors (biases, norms, scales, a class token), what is excluded or trained whole, and layers that are left out by
    name do not count. A kind is a class, with the parameter's name where it is not "weight".

    Returns:
        Text, or "" where the share is a tenth or less, or where the options name the layers.
    """
    config, names = handle.record.config, handle.left_out()
    if config.target_modules not in BY_KIND:
        return ""
    excluded, saved = matcher(config.exclude_modules), matcher(config.all_modules_to_save())
    left_out = {id(module): name in names for name, module in handle.modules}  # names in the root may be others
    total, sizes, adapts_more = 0, Counter[str](), False
    for name, parameter, module, leaf in handle.base():
        if id(module) not in left_out:  # the handle is a part of the root
            continue
        size = shape_of(parameter).numel()
        total += size
        path = name.rpartition(".")[0]
        if not is_matrix(parameter) or not adapters_in(module).keys().isdisjoint(("", leaf)):
            continue
        if not left_out[id(module)] and not excluded(path) and not any(map(saved, (path, *parent_names(path)))):
            cls = module.lora_base if isinstance(module, Swapped) else type(module)
            adapts_more |= config.target_modules == ALL_LINEAR and isinstance(module, MORE_KINDS)
            sizes[cls.__name__ if leaf == "weight" else f"{cls.__name__}.{leaf}"] += size
    whole = sizes.total()
    if whole <= LITTLE * total:
        return ""
    kinds = ", ".join(f"{kind} {size / total:.1%}" for kind, size in sizes.most_common(MOST_KINDS))
    others = ", ..." if len(sizes) > MOST_KINDS else ""
    advice = f"; {ALL_LAYERS!r} adapts more" if adapts_more else ""
    return f"{whole / total:.1%} of the parameters{advice} ({kinds}{others})"


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether at least two dimensions of a parameter are larger than 1."""
    return sum(size > 1 for size in shape_of(parameter)) > 1
