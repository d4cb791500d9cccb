"""Find stacks of experts that "all-linear" or "all-layers" does not adapt, and the option that adapts them."""

from __future__ import annotations

from torch import nn

from ..matching import BY_KIND, matcher
from ..names import parent_names, suffixes
from ..nn.adapted_module import Swapped, adapters_in
from ..nn.parameter import weights_of
from ..nn.quantized import shape_of
from .adapted_model import AdaptedModel

LITTLE = 0.1  # of the parameters: up to this share nothing is logged


def option_for_experts(handle: AdaptedModel) -> str:
    """Return the option that adapts stacks of experts which "all-linear" or "all-layers" does not adapt, to copy.

    A stack has three dimensions, and is no weight of a class of torch, such as a convolution. What is excluded or
    fully trained does not count.

    Returns:
        Text, as "target_parameters=['gate_up_proj', 'down_proj']", or "" where the stacks are a tenth of the parameters
        or less, or where the options name the layers.
    """
    config = handle.injection.config
    if config.target_modules not in BY_KIND:
        return ""
    excluded = matcher(config.exclude_modules)
    saved = matcher(config.all_modules_to_save())
    here = {module for _, module in handle.modules}  # the model may be a part of the root
    total = 0
    sizes: dict[str, int] = {}
    for name, parameter, module, leaf in handle.base():
        if module not in here:
            continue
        shape = shape_of(parameter)
        total += shape.numel()
        path = name.rpartition(".")[0]
        is_stack = len(shape) == 3 and min(shape) > 1 and not _is_of_torch(module)
        is_adapted = not adapters_in(module).keys().isdisjoint(("", leaf))
        if is_stack and not (is_adapted or excluded(path) or any(map(saved, (path, *parent_names(path))))):
            sizes[name] = shape.numel()
    if sum(sizes.values()) <= LITTLE * total:
        return ""
    others = [f".{name}" for name in weights_of(dict(handle.root_modules)) if name not in sizes]
    entries: dict[str, None] = {}
    for name in sizes:  # the shortest end that names no other parameter
        ends = sorted(suffixes(name), key=len)
        entries[next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)] = None
    return f"target_parameters={list(entries)}"


def _is_of_torch(module: nn.Module) -> bool:
    cls = module.lora_base if isinstance(module, Swapped) else type(module)
    return any(each.__module__.startswith("torch.nn.modules.") and each is not nn.Module for each in cls.__mro__)
