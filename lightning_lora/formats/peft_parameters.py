"""PEFT's adapters of single parameters (target_parameters): how their names nest.

PEFT wraps a module once for each of its parameters, in the order in which the module registered them:

    <module>.base_layer.base_layer.lora_A.weight    of the first one
    <module>.base_layer.lora_A.weight               of the second
    <module>.lora_A.weight                          of the last

No name says which parameter an adapter belongs to. peft_stacks.py has the layout of a stack of experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import LoRAError
from ..matching import matcher
from ..names import parameter_factor_name, suffixes

RECURRENT = re.compile(r"weight_(ih|hh|hr)_l(\d+)(_reverse)?")
USUAL = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' experts, in the order in which they are registered

OUT_PROJ = ".out_proj"
PARAMETERS = "parameters"  # in the description of a folder: the nesting

Order = Callable[[Collection[str]], Sequence[str] | None]  # of parameters of one module, or None where it is not known
Nesting = Mapping[str, Sequence[str]]  # the adapted parameters of each module, the first registered one first


def usual_order(parameters: Collection[str]) -> Sequence[str] | None:
    """Return parameters in the order in which nn.LSTM, nn.GRU and transformers' experts register them, else None."""
    matches = [RECURRENT.fullmatch(name) for name in parameters]
    if all(matches):
        places = {m.group(): (int(m[2]), m[3] or "", ("ih", "hh", "hr").index(m[1])) for m in matches if m}
        return sorted(parameters, key=places.__getitem__)
    if set(USUAL).issuperset(parameters) or len(parameters) == 1:
        return sorted(parameters, key=lambda name: USUAL.index(name) if name in USUAL else 0)
    return None


def order_in(model: nn.Module) -> Order:
    """Return the order in which the modules of a model register parameters."""

    def order(parameters: Collection[str]) -> Sequence[str] | None:
        for module in model.modules():
            if module._parameters.keys() >= set(parameters):
                return [name for name in module._parameters if name in parameters]
        return usual_order(parameters)

    return order


def check_order(parameters: Iterable[str], order: Order) -> None:
    """Raise LoRAError where a model registers adapted parameters of a module in another order than the given one."""
    for leaves in nesting_of(parameters).values():
        ordered = order(leaves)
        if ordered is not None and list(ordered) != list(leaves):
            raise LoRAError(
                f"load_adapter: PEFT's names do not say which parameter each adapter is of. Without a model they were "
                f"read in the order {list(leaves)}, and this model registers {list(ordered)}. Pass the folder itself "
                "that PEFT wrote: load_adapter(model, folder)."
            )


def nesting_of(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters of each module, from full names in the order in which they are registered."""
    nesting: dict[str, list[str]] = {}
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        nesting.setdefault(module, []).append(leaf)
    return nesting


def nesting_in_peft(options: Mapping[str, Any], wrapped: Mapping[str, int], order: Order, where: object) -> Nesting:
    """Return the adapted parameters of each module in a PEFT folder.

    Args:
        options: the fields of adapter_config.json.
        wrapped: how many adapters each module has.
        order: gives the order in which a module registers parameters.
        where: for messages.

    Raises:
        LoRAError: the options name other numbers of parameters, or their order is not known.
    """
    targeted = options.get("target_parameters")  # of another type it is refused with the other options
    entries = [entry for entry in targeted if isinstance(entry, str)] if isinstance(targeted, list) else []
    targets = options.get("target_modules")
    if not entries:
        return {}
    is_layer = matcher(targets if isinstance(targets, (str, list)) else None)
    nesting = {}
    for module, count in wrapped.items():
        attention = module.removesuffix(OUT_PROJ)  # whose out_proj PEFT adapts with it
        if count == 1 and (is_layer(module) or (attention != module and is_layer(attention))):
            continue
        leaves = _parameters_of(module, entries, count)
        ordered = order(leaves) if len(leaves) == count else None
        if ordered is None:
            raise LoRAError(
                f"{where}: {module!r} has adapters of {count} parameters, and target_parameters={entries} does not "
                "say which of them each is of. Load the folder onto its model in Python: load_adapter(model, folder)."
            )
        nesting[module] = list(ordered)
    return nesting


def _parameters_of(module: str, entries: Sequence[str], count: int) -> list[str]:
    """Return the parameters of a module that target_parameters names; entries with the module's name go first."""
    named: dict[str, None] = {}
    anywhere: dict[str, None] = {}
    for entry in entries:
        owner, _, leaf = entry.rpartition(".")
        if owner and owner in suffixes(module):
            named[leaf] = None
        elif not owner:
            anywhere[leaf] = None
    return list(named) if len(named) == count else list(dict.fromkeys((*named, *anywhere)))


def nesting_of_metadata(metadata: Mapping[str, Any], where: object) -> dict[str, list[str]]:
    """Return the nesting that this package wrote into a folder.

    Raises:
        LoRAError: it has another form.
    """
    nesting: dict[str, list[str]] = metadata.get(PARAMETERS, {})
    modules = nesting.items() if isinstance(nesting, dict) else [(None, None)]
    if not all(isinstance(leaves, list) and all(isinstance(leaf, str) for leaf in leaves) for _, leaves in modules):
        raise LoRAError(f"{where}: the adapter's description is damaged: {PARAMETERS} is {nesting!r:.80}.")
    return nesting


def our_factor(module: str, depth: int, leaf: str, nesting: Nesting) -> str | None:
    """Return our name of A or B of the parameter that PEFT wraps `depth` wrappers deep, or None without one."""
    parameters = nesting.get(module, ())
    if depth >= len(parameters):
        return None
    name = parameter_factor_name(parameters[len(parameters) - 1 - depth], leaf)
    return f"{module}.{name}" if module else name
