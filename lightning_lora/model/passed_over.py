"""Say what "all-linear" or "all-layers" passes over in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..matching import ALL_LAYERS, ALL_LINEAR, BY_KIND, matcher
from ..names import parent_names, suffixes
from ..nn.adapted_module import Swapped
from ..nn.adapted_weights import adapters_in
from ..nn.layer_kinds import MORE_MODULES
from ..nn.parameter import weights_of
from ..nn.quantized import shape_of
from .adapted_model import AdaptedModel

LITTLE, MOST_KINDS = 0.1, 3  # a share up to this is not told; how many kinds are


class Weight(NamedTuple):
    """A matrix that is passed over."""

    name: str  # in the root
    module: nn.Module
    leaf: str
    shape: torch.Size


def passed_over(handle: AdaptedModel) -> str:
    """Return the share of the parameters that "all-linear" or "all-layers" passes over, and its largest kinds.

    Vectors (biases, norms, scales, a class token), what is excluded or trained whole, and layers that are left out by
    name do not count. A kind is a class, with the parameter's name where it is not "weight".

    Returns:
        Text, or "" where the share is a tenth or less, or where the options name the layers.
    """
    total, weights = _weights(handle)
    sizes, adapts_more = Counter[str](), False
    for weight in weights:
        module, leaf = weight.module, weight.leaf
        cls = module.lora_base if isinstance(module, Swapped) else type(module)
        adapts_more |= handle.injection.config.target_modules == ALL_LINEAR and isinstance(module, MORE_MODULES)
        sizes[cls.__name__ if leaf == "weight" else f"{cls.__name__}.{leaf}"] += weight.shape.numel()
    whole = sizes.total()
    if whole <= LITTLE * total:
        return ""
    kinds = ", ".join(f"{kind} {size / total:.1%}" for kind, size in sizes.most_common(MOST_KINDS))
    others = ", ..." if len(sizes) > MOST_KINDS else ""
    advice = f"; {ALL_LAYERS!r} adapts more" if adapts_more else ""
    return f"{whole / total:.1%} of the parameters{advice} ({kinds}{others})"


def experts(handle: AdaptedModel) -> str:
    """Return the option that adapts stacks of experts which "all-linear" or "all-layers" passes over, to copy.

    A stack has three dimensions, and is no weight of a class of torch, such as a convolution.

    Returns:
        Text, as "target_parameters=['gate_up_proj', 'down_proj']", or "" where these are a tenth of the parameters or
        less.
    """
    total, weights = _weights(handle)
    stacks = {each.name: each for each in weights if len(each.shape) == 3 and min(each.shape) > 1}
    stacks = {name: each for name, each in stacks.items() if not _is_of_torch(each.module)}
    if sum(each.shape.numel() for each in stacks.values()) <= LITTLE * total:
        return ""
    others = [f".{name}" for name in weights_of(dict(handle.root_modules)) if name not in stacks]
    return f"target_parameters={list(dict.fromkeys(_short(name, others) for name in stacks))}"


def _short(name: str, others: Sequence[str]) -> str:
    """Return the shortest dotted end of a name that is none of other names'."""
    ends = sorted(suffixes(name), key=len)
    return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)


def _is_of_torch(module: nn.Module) -> bool:
    cls = module.lora_base if isinstance(module, Swapped) else type(module)
    return any(each.__module__.startswith("torch.nn.modules.") and each is not nn.Module for each in cls.__mro__)


def _weights(handle: AdaptedModel) -> tuple[int, list[Weight]]:
    """Return the number of parameters, and the weights that a value of BY_KIND passes over."""
    config, names = handle.injection.config, handle.left_out()
    if config.target_modules not in BY_KIND:
        return 0, []
    excluded, saved = matcher(config.exclude_modules), matcher(config.all_modules_to_save())
    left_out = {id(module): name in names for name, module in handle.modules}  # names in the root may be others
    total, found = 0, []
    for name, parameter, module, leaf in handle.base():
        if id(module) not in left_out:  # the handle is a part of the root
            continue
        total += shape_of(parameter).numel()
        path = name.rpartition(".")[0]
        if not is_matrix(parameter) or not adapters_in(module).keys().isdisjoint(("", leaf)):
            continue
        if not left_out[id(module)] and not excluded(path) and not any(map(saved, (path, *parent_names(path)))):
            found.append(Weight(name, module, leaf, shape_of(parameter)))
    return total, found


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether at least two dimensions of a parameter are larger than 1."""
    return sum(size > 1 for size in shape_of(parameter)) > 1
