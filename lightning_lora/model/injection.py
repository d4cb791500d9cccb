"""What a model remembers of its injection.

One record a model. The injected module holds it, and so does each adapted layer, so that it is found from any module
that holds the layers: the injected one, one around it, the network inside, or a new module around the same network.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import ATTRIBUTE, canonical
from ..nn.lora_layer import LoRALayer, adapted_layers, is_factor
from .named_state import base_parameters, named_state

Value = TypeVar("Value")


@dataclass
class Injection:
    """The record of one injection; names are relative to the injected module.

    Attributes:
        config: the options.
        merge_weights: eval() merges, train() unmerges.
        requires_grad: of every base parameter, before injection.
        initial: values of what training changes beside A and B (trained base parameters, persistent buffers), from
            before training.
        trained: names of base parameters that were ever trainable.
        unfrozen: those of them that another hand than the options made trainable.
        save: the kind of Lightning checkpoint, or None for an unfiltered one.
        fingerprint: of the base at fit start, by the names of the LightningModule.
        validated: every layer was there, and each entry of the options names something.
        seed: what adapters are drawn from, or "" for the random stream of the moment.
        root: the injected module; not held, and not known to a copy.
    """

    config: LoRAConfig
    merge_weights: bool = False
    requires_grad: dict[str, bool] = field(default_factory=dict)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    unfrozen: set[str] = field(default_factory=set)
    save: Any = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    validated: bool = False
    seed: str = ""
    root: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"root": None}

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Bring every name into those of another module."""
        self.requires_grad = {new_name(name): value for name, value in self.requires_grad.items()}
        self.initial = {new_name(name): value for name, value in self.initial.items()}
        self.trained, self.unfrozen = set(map(new_name, self.trained)), set(map(new_name, self.unfrozen))


class Injected(NamedTuple):
    """An injection as one module sees it.

    Attributes:
        root: the injected module, which the record's names are relative to.
        record: what is remembered.
        prefix: what a module around the root has before the record's names, "" or ending in a dot.
        inside: what the record's names have before those of a module inside the root, "" or ending in a dot.
    """

    root: nn.Module
    record: Injection
    prefix: str = ""
    inside: str = ""

    def seen(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return values by the names of the module that sees the injection; what it does not hold is left out."""
        return {self.name_seen(name): value for name, value in values.items() if name.startswith(self.inside)}

    def name_seen(self, name: str) -> str:
        """Return a name of the record as the module that sees the injection has it."""
        return self.prefix + name.removeprefix(self.inside)


def begin_record(root: nn.Module, record: Injection) -> None:
    """Let a module hold the record of its injection."""
    record.root = weakref.ref(root)
    setattr(root, ATTRIBUTE, record)


def find_injection(model: nn.Module) -> Injected | None:
    """Return the injection of a module that holds all its adapted layers, or None.

    The injected module itself answers at once; any other module is walked.

    Raises:
        LoRAError: the module holds several injected models.
    """
    if ATTRIBUTE in vars(model):
        return Injected(model, vars(model)[ATTRIBUTE])
    holders = [(name, m) for name, m in _named_modules(model) if ATTRIBUTE in vars(m)]
    layers = adapted_layers(model)
    records = [vars(holder)[ATTRIBUTE] for _, holder in holders] + [layer.lora.injection for layer in layers.values()]
    if len({id(record) for record in records}) > 1:
        places = ", ".join(repr(name) for name, _ in holders) or ", ".join(map(repr, layers))
        raise LoRAError(f"{type(model).__name__} holds several injected models ({places}); handle each by itself.")
    if holders:
        name, root = holders[0]
        return Injected(root, records[0], prefix=f"{name}.")
    return _find_by_layers(model, layers, records[0]) if layers else None


def _find_by_layers(model: nn.Module, layers: Mapping[str, LoRALayer], record: Injection) -> Injected | None:
    """For a module that does not hold the injected one: it is inside of that, or takes its place."""
    root = record.root() if record.root is not None else None
    every = set(adapted_layers(root).values()) if root is not None else set()
    name, layer = next(iter(layers.items()))
    if every - set(layers.values()):
        return None
    if root is not None and any(module is model for module in root.modules()):
        return Injected(root, record, inside=_without_tail(layer.lora.name, name))
    _adopt(model, layers, record)
    return Injected(model, record)


def _adopt(model: nn.Module, layers: Mapping[str, LoRALayer], record: Injection) -> None:
    """Let another module that holds the layers take the place of an injected one that is gone, or given up for it."""
    name, layer = next(iter(layers.items()))
    record.rename(_translation(layer.lora.name, name))
    root = record.root() if record.root is not None else None
    if root is not None:
        delattr(root, ATTRIBUTE)
    for name, layer in layers.items():
        layer.lora.name = name
    begin_record(model, record)


def _translation(name: str, other_name: str) -> Callable[[str], str]:
    """From names beside `name` to those beside `other_name`, two names of one layer, of which one ends the other."""
    if other_name.endswith(name):
        added = _without_tail(other_name, name)
        return lambda known: added + known
    removed = _without_tail(name, other_name)
    return lambda known: known.removeprefix(removed)


def _without_tail(name: str, tail: str) -> str:
    """What a dotted name has before its tail, "" or ending in a dot."""
    return f"{name}.".removesuffix(f"{tail}." if tail else "")


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((canonical(name), module) for name, module in model.named_modules())


def require_injection(model: nn.Module, verb: str) -> Injected:
    """Return what find_injection finds.

    Raises:
        LoRAError: it finds nothing.
    """
    found = find_injection(model)
    if found is None:
        raise LoRAError(
            f"{verb}: {type(model).__name__} was not injected; call inject(model, LoRAConfig(...)) first, or pass the "
            "module that it was called on."
        )
    return found


def record_trainable(model: nn.Module, *, expected: bool = False) -> None:
    """Record the present value of every base parameter that has become trainable.

    Args:
        model: an injected model.
        expected: the options ask for it; otherwise another hand unfroze it, and a warning says so.
    """
    injected = require_injection(model, "record_trainable")
    record = injected.record
    new = {
        name: parameter
        for name, parameter in base_parameters(injected.root).items()
        if parameter.requires_grad and name not in record.trained
    }
    for name, parameter in new.items():
        record.trained.add(name)
        record.initial[name] = parameter.detach().clone()
    if new and not expected:
        record.unfrozen.update(new)
        shown = ", ".join(list(new)[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        warnings.warn(
            f"lightning_lora: base parameters were unfrozen after injection ({shown}); they are saved with the adapter",
            stacklevel=2,
        )


def snapshot_initial(model: nn.Module) -> None:
    """Record the present values as those from before training; where layers are built anew later, of new names only."""
    root, record, *_ = require_injection(model, "snapshot_initial")
    tensors = {name: tensor for name, tensor, module in named_state(root) if not is_factor(name, module)}
    buffers = {id(buffer) for buffer in root.buffers()}
    known = record.initial if record.validated else {}
    record.initial = known | {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if tensor is not None and name not in known and (name in record.trained or id(tensor) in buffers)
    }


def snapshot_materialised(model: nn.Module) -> None:
    """Record present values where the known ones are from the meta device; call before training or loading."""
    root, record, *_ = require_injection(model, "snapshot_materialised")
    live = {name: tensor for name, tensor, _ in named_state(root) if tensor is not None}
    for name, value in record.initial.items():
        if value.is_meta:
            record.initial[name] = live[name].detach().clone()


def record_loaded(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Record the values of a new base, for an injected model or a part of it: training will start from these."""
    layers = adapted_layers(module)
    if not layers:
        return
    name, layer = next(iter(layers.items()))
    record, recorded_name = layer.lora.injection, _translation(name, layer.lora.name)
    record.fingerprint = {}
    for name, value in values.items():
        known = record.initial.get(recorded_name(name))
        if known is not None and isinstance(value, torch.Tensor) and known.shape == value.shape:
            device = value.device if known.is_meta else known.device
            record.initial[recorded_name(name)] = value.detach().clone().to(device, known.dtype)
