"""What is known of a model's tensors and modules from before training. It goes with them.

[Note: facts go with tensors]

Values from before training, requires_grad from before injection, the reason for which a tensor is trained: each is a
fact about one tensor. Names do not keep it, because blocks of a model are re-ordered, wrapped, renamed, sliced and
copied after injection. So a fact is found in three steps:

1. By the tensor's memory. That holds where a module is built anew around the same tensors, as SyncBatchNorm is. A weak
   reference to the tensor itself would forbid torch.utils.swap_tensors, by which torch casts tensors of some classes.
2. Where a cast or a strategy has replaced the tensor: by its name within its module, which holds the facts of its
   tensors. Python copies and pickles them with the module, where the tensors are new ones, too.
3. Neither: a new tensor of a new module has no facts.

A module of an injected model has one ModuleFacts, from injection (or when it is built) until the adapter is taken out.
It also says to which injection the module belongs: a copy of a part of a model brings an injection of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ..nn.adapted_module import AdaptedModule, NamedModules
from .named_state import own_state

FACTS_ATTRIBUTE = "lora_facts"  # of each module of an injected model

# Why a base parameter is trained: the options ask, something unfroze it after injection, or it was resized before.
Why = Literal["asked", "unfrozen", "resized"]


class Memory(NamedTuple):
    """Where a tensor lies. While `held` is there, no other memory gets the same address."""

    address: tuple[int, int]
    held: StorageWeakRef


def address_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return where a tensor lies, or None for one that is empty, lazy, or of a class without memory of its own."""
    if is_lazy(tensor) or not tensor.numel():
        return None
    try:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    except (NotImplementedError, RuntimeError):
        return None


def memory_of(tensor: torch.Tensor) -> Memory | None:
    """Return where a tensor lies and a weak reference that keeps the address from being used again, or None."""
    address = address_of(tensor)
    if address is None:
        return None
    return Memory(address, StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class Fact:
    """What is known of one base parameter or persistent buffer."""

    requires_grad: bool | None = None  # before injection; None for a buffer
    trained: Why | None = None  # why it was trainable at some time
    initial: torch.Tensor | None = None  # the value from before training
    entry: Any = None  # of a frozen tensor: its entry in the base's fingerprint, from fit start
    memory: Memory | None = None  # of the tensor; None in a copy

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"memory": None}


@dataclass(eq=False)
class ModuleFacts:
    """What is known of one module of an injected model."""

    injection: Any  # the injection that the module belongs to
    tensors: dict[str, Fact] = field(default_factory=dict)  # by the tensor's name in the module
    adapted_children: frozenset[str] = frozenset()  # the names of the children in which layers were adapted
    left_out: str = ""  # why "all-linear" or "all-layers" leaves the layer out
    is_scope: bool = False  # the loaded adapter is for this part of the model


class Known(NamedTuple):
    """A live tensor and what is known of it."""

    tensor: torch.Tensor
    fact: Fact


def facts_of(module: nn.Module) -> ModuleFacts | None:
    """Return what is known of a module, or None."""
    found: ModuleFacts | None = vars(module).get(FACTS_ATTRIBUTE)
    return found


def begin_facts(places: NamedModules, injection: Any, *, scope: str = "") -> None:
    """Let each module of an injected model have facts of this injection. In place; harmless when repeated.

    A module without tensors and modules, such as a loss, gets none: it may be one object for many models, as a default
    argument is, and what lies in it is pickled with all of them.

    A module that belongs to another injection keeps its facts: it is of a copy of a part of this model, or of another
    model.

    Args:
        places: every module of the injected module, with its names.
        injection: the injection.
        scope: the name of the module that a loaded adapter is for, or "".
    """
    for name, module in places:
        held = chain(module._parameters.values(), module._buffers.values(), module._modules.values())
        if all(each is None for each in held):
            continue
        facts = facts_of(module)
        if facts is None or "ended" in facts.injection.marks or facts.injection.marks >= {"attached alone"}:
            vars(module)[FACTS_ATTRIBUTE] = ModuleFacts(injection, is_scope=bool(scope) and name == scope)


def end_facts(modules: Iterable[nn.Module], injection: Any) -> None:
    """Remove what is known of modules that belong to an injection. In place; harmless when repeated."""
    for module in modules:
        facts = facts_of(module)
        if facts is not None and facts.injection is injection:
            del vars(module)[FACTS_ATTRIBUTE]


def known_tensors(modules: Collection[nn.Module], recorded: Iterable[Fact]) -> dict[int, Known]:
    """Return each live tensor with what is known of it, by the tensor's id.

    Each module gets the facts of its tensors, so that a copy or a cast after this finds them there.

    Args:
        modules: of a model, each once.
        recorded: facts of tensors that may lie in other modules than those they were recorded in.
    """
    held = {module: facts.tensors for module in modules if (facts := facts_of(module)) is not None}
    everywhere = (*recorded, *(fact for tensors in held.values() for fact in tensors.values()))
    by_memory: dict[tuple[int, int] | None, Fact] = {}
    for fact in everywhere:
        if fact.memory is not None:
            by_memory[fact.memory.address] = fact
    found: dict[int, Known] = {}
    replaced: list[tuple[torch.Tensor, Fact]] = []
    for module in modules:
        own = held.get(module)
        for leaf, tensor in own_state(module).items():
            address = address_of(tensor)
            if address in by_memory:
                found[id(tensor)] = Known(tensor, by_memory[address])
                if own is not None:
                    own[leaf] = found[id(tensor)].fact
            elif own is not None and leaf in own:
                replaced.append((tensor, own[leaf]))
    used = {known.fact for known in found.values()}
    for tensor, fact in replaced:
        # A fact whose own tensor is still in the model was left behind by a tensor that moved.
        if fact not in used:
            fact.memory = memory_of(tensor)
            found[id(tensor)] = Known(tensor, fact)
    return found


def note_adapted_children(module: nn.Module) -> bool:
    """Note in each module with facts which of its children hold adapted layers. In place.

    Returns:
        Whether the module is one or holds one.
    """
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    names = frozenset(name for name, child in children if note_adapted_children(child))
    facts = facts_of(module)
    if facts is not None:
        facts.adapted_children = names
    return bool(names) or isinstance(module, AdaptedModule)


def lost_children(module: nn.Module) -> list[str]:
    """Return the names of a module's children that held adapted layers and now are gone or hold none.

    Children that changed places within the module are still there.
    """
    facts = facts_of(module)
    if facts is None or not facts.adapted_children:
        return []
    now = {
        name
        for name, child in module._modules.items()
        if child is not None and any(isinstance(each, AdaptedModule) for each in child.modules())
    }
    return sorted(facts.adapted_children - now) if len(now) < len(facts.adapted_children) else []
