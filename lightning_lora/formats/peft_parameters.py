"""PEFT's adapters of single parameters (target_parameters): how their names nest, and how a stack of experts lies.

PEFT wraps a module once for each of its parameters, in the order in which the module registered them:

    <module>.base_layer.base_layer.lora_A.weight    of the first one
    <module>.base_layer.lora_A.weight               of the second
    <module>.lora_A.weight                          of the last

No name says which parameter an adapter belongs to.

The layout of the factors of a stack of experts changed twice. A stack W is (E, d1, d2), and its module may say
is_transposed. Factors of PEFT's for it, in the words of nn/low_rank.py (read in peft's tags, and run):

    PEFT                 not is_transposed             is_transposed
    before 0.19          TransposedExperts             TransposedExperts
    0.19.0               TransposedExperts             Experts
    0.19.1 and later     Experts                       TransposedExperts

The last row is ours, and that of every folder that this package wrote. Experts adds B @ A to each matrix, and
TransposedExperts its transpose, so factors (B^T, A^T) of the one kind equal (A, B) of the other. A stack of one expert
gets B @ A from every PEFT.

Its A (E * r, n) is the same as ours. Its B is (m, r * E), and the column of rank k and expert e is k * E + e.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..config import LoRAConfig
from ..errors import LoRAError, shown
from ..matching import matcher
from ..names import A, B, parameter_factor_name, suffixes
from ..nn.low_rank import EXPERTS, STACKS, TRANSPOSED_EXPERTS
from .peft_equivalents import peft_numbers

RECURRENT = re.compile(r"weight_(ih|hh|hr)_l(\d+)(_reverse)?")
USUAL = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' experts, in the order in which they are registered

OUT_PROJ = ".out_proj"
PARAMETERS = "parameters"  # in the description of a folder: the nesting

Order = Callable[[Collection[str]], Sequence[str] | None]  # of parameters of one module, or None where it is not known
Nesting = Mapping[str, Sequence[str]]  # the adapted parameters of each module, the first registered one first

TODAYS = "0.19.1"  # the first release of the last row
SECOND_ROW, THIRD_ROW = (0, 19, 0), (0, 19, 1)
LAST_OF_FIRST_ROW = (0, 18, 1)


def usual_order(parameters: Collection[str]) -> Sequence[str] | None:
    """Return parameters in the order in which nn.LSTM, nn.GRU and transformers' experts register them, else None."""
    matches = [RECURRENT.fullmatch(name) for name in parameters]
    if all(matches):
        places = {m.group(): (int(m[2]), m[3] or "", ("ih", "hh", "hr").index(m[1])) for m in matches if m}
        return sorted(parameters, key=places.__getitem__)
    if set(USUAL).issuperset(parameters) or len(parameters) == 1:
        return sorted(parameters, key=lambda name: USUAL.index(name) if name in USUAL else 0)
    return None


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


# --- stacks of experts ---


def stacks_to_peft(tensors: Mapping[str, torch.Tensor], factors: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return tensors with each B of a stack in PEFT's layout, for the names of A and B of each parameter."""
    changed = dict(tensors)
    for name_a, name_b in factors:
        b = tensors[name_b]
        rank = b.shape[1]
        stack = b.view(tensors[name_a].shape[0] // rank, -1, rank)
        changed[name_b] = stack.permute(1, 2, 0).reshape(stack.shape[1], -1)
    return changed


def stacks_from_peft(
    tensors: Mapping[str, torch.Tensor], factors: Mapping[str, tuple[str, str]], config: LoRAConfig, where: object
) -> dict[str, torch.Tensor]:
    """Undo stacks_to_peft, for the names of A and B of each parameter; the options tell the rank.

    Raises:
        LoRAError: the shapes do not go together.
    """
    changed = dict(tensors)
    for parameter, (name_a, name_b) in factors.items():
        a, b, rank = tensors.get(name_a), tensors.get(name_b), config.rank(parameter)
        if a is None or b is None:
            continue  # which is refused where factors are checked
        experts = a.shape[0] // rank if a.dim() == b.dim() == 2 else 0
        if not experts or a.shape[0] != experts * rank or b.shape[1] != experts * rank:
            raise LoRAError(
                f"{where}: {parameter!r}: A {tuple(a.shape)} and B {tuple(b.shape)} are no stack of rank {rank}."
            )
        changed[name_b] = b.view(-1, rank, experts).permute(2, 0, 1).reshape(-1, rank)
    return changed


def with_kinds_of_stacks(adapter: Adapter, where: object) -> Adapter:
    """Return an adapter of a folder of PEFT's with the kind of each stack, where its version alone tells it.

    Raises:
        LoRAError: a state of peft between releases wrote it, which may have either layout.
    """
    stacks, version = stacks_of(adapter), adapter.peft_version
    numbers = peft_numbers(version)
    if stacks and "dev" in str(version) and LAST_OF_FIRST_ROW <= numbers <= THIRD_ROW:
        raise LoRAError(
            f"{where}: {stacks[0]!r} is a stack of experts, and peft changed their layout between 0.18.1 and 0.19.1: "
            f"{shown(version)} may have either. Set peft_version in adapter_config.json to the release whose layout it "
            "has."
        )
    of_stacks = dict.fromkeys(stacks, TRANSPOSED_EXPERTS) if numbers < SECOND_ROW else {}
    return adapter.with_kinds(of_stacks)


def stacks_of(adapter: Adapter) -> list[str]:
    """Return the parameters that are stacks of several experts."""
    return [name for name in adapter.parameters if _experts(adapter, name) > 1]


def stacks_as_in_model(adapter: Adapter, kinds: Mapping[str, str]) -> Adapter:
    """Return an adapter of PEFT's with factors of the kinds that the model's parameters have."""
    tensors, turned = dict(adapter.tensors), {}
    for name in adapter.parameters:
        kind = kinds.get(name, "")
        if kind in STACKS and _kind_in_peft(adapter, name, kind) != kind:
            name_a, name_b = adapter.factor_name(name, A), adapter.factor_name(name, B)
            tensors[name_a], tensors[name_b] = _transposed(adapter.tensors[name_a], adapter.tensors[name_b])
            turned[name] = kind
    return replace(adapter, tensors=tensors).with_kinds(turned)


def refuse_without_model(adapter: Adapter, where: object) -> None:
    """Raise LoRAError for stacks in a layout of PEFT's that can be written anew only where is_transposed is known."""
    stacks = stacks_of(adapter) if adapter.peft_version is not None else []
    if stacks and peft_numbers(adapter.peft_version) < THIRD_ROW:
        raise LoRAError(
            f"{where}: {stacks[0]!r} is a stack of experts of peft {adapter.peft_version or 'before 0.18'}. Later ones "
            "have another layout, which depends on is_transposed of the model's module. Load the folder onto its model "
            "(load_adapter), and save that (save_adapter)."
        )


def _kind_in_peft(adapter: Adapter, name: str, kind: str) -> str:
    """Return the kind of the factors of a stack in PEFT's file, given the kind of the parameter in the model."""
    if adapter.layers[name].kind:
        return adapter.layers[name].kind
    if _experts(adapter, name) == 1:
        return EXPERTS
    other = EXPERTS if kind == TRANSPOSED_EXPERTS else TRANSPOSED_EXPERTS
    return other if peft_numbers(adapter.peft_version) == SECOND_ROW else kind


def _experts(adapter: Adapter, name: str) -> int:
    a, b = (adapter.tensors.get(adapter.factor_name(name, leaf)) for leaf in (A, B))
    return 0 if a is None or b is None else a.shape[0] // b.shape[1]


def _transposed(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of a stack whose product is the transpose of B @ A, for each expert."""
    rank = b.shape[1]
    stacked_a, stacked_b = a.view(-1, rank, a.shape[1]), b.view(a.shape[0] // rank, -1, rank)
    return stacked_b.mT.reshape(-1, stacked_b.shape[1]), stacked_a.mT.reshape(-1, rank)
