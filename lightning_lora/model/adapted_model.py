"""The handle of an injected model: opened once by each public function and each hook, and passed inward.

What lies in the model is listed once, when it is first asked for. A handle is thrown away at the end of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import nn

from ..names import canonical
from ..nn.layer_kinds import layer_kinds
from ..nn.lora_layer import AdaptedWeights, adapted_layers
from .injection import Injected, find_injection, require_injection
from .named_state import StateEntry, base_parameters, state_of
from .wrappers import inside_known_wrappers, unwrapped

Value = TypeVar("Value")
Mark = Literal["trained", "unfrozen", "resized"]


class AdaptedModel:
    """An injected model as seen from the module that a caller gave.

    Attributes:
        model: that module, without wrappers around it. It holds all adapted layers.
        root: the injected module: `model` itself, or a module around or inside of it.
        record: what is remembered of the injection.
    """

    def __init__(self, model: nn.Module, injected: Injected) -> None:
        self.model, self.root, self.record = model, injected.root, injected.record
        self._injected = injected

    @cached_property
    def places(self) -> list[tuple[str, nn.Module]]:
        """Every module under every name, without the segments of wrappers."""
        return [(canonical(name), module) for name, module in self.model.named_modules(remove_duplicate=False)]

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every module once, under its first name."""
        seen: set[nn.Module] = set()
        return [(n, m) for n, m in self.places if not (m in seen or seen.add(m))]  # type: ignore[func-returns-value]

    @cached_property
    def layers(self) -> dict[str, AdaptedWeights]:
        """The adapters of layers and parameters, by name; a shared one under its first."""
        return adapted_layers(self.model, modules=self.modules)

    @cached_property
    def layers_by_every_name(self) -> dict[str, AdaptedWeights]:
        """The adapters of layers and parameters, under every name."""
        return adapted_layers(self.model, remove_duplicate=False, modules=self.places)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The kind of each adapted layer that has factors, by first names: one of low_rank.KINDS."""
        return layer_kinds(self.model)

    def look_again(self) -> None:
        """Forget the lists, after layers were adapted, replaced or taken out."""
        for name in ("places", "modules", "layers", "layers_by_every_name", "kinds"):
            vars(self).pop(name, None)

    def state(self) -> list[StateEntry]:
        """Return the names of model.state_dict(), each with its live tensor and owner; see named_state."""
        return list(state_of(self.places))

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the root without those of adapters, by the root's names, each once."""
        return base_parameters(self.root)

    def scope(self) -> str:
        """Return what names have before those that the options are about, "" or ending in a dot."""
        return self._injected.scope()

    def initial(self) -> dict[str, torch.Tensor]:
        """Return the values from before training of all that it changes beside the adapters, by name."""
        return self._injected.seen(self.record.initial)

    def initial_of(self, mark: Mark) -> dict[str, torch.Tensor]:
        """Return the values from before training of the base parameters with a mark, under each of their names."""
        parameters, record = self.base_parameters(), self.record
        values = {id(parameters[n]): record.initial[n] for n in getattr(record, mark) if n in parameters}
        return {name: values[id(tensor)] for name, tensor, _ in self.state() if id(tensor) in values}

    def set_initial(self, values: Mapping[str, torch.Tensor]) -> None:
        """Let these be the values from before training: of what has a name here, and of no more."""
        held = self._injected.seen({name: name for name in self.base_parameters()})
        names = {seen: name for seen, name in held.items()}
        prefix, inside = self._injected.prefix, self._injected.inside
        self.record.initial = {
            names.get(name, inside + name.removeprefix(prefix)): value for name, value in values.items()
        }

    def record_unfrozen(self, names: Iterable[str]) -> None:
        """Record base parameters as trained, with their present values, that were unfrozen in another run.

        Those among the names that are recorded already, or are no base parameters, are passed over.
        """
        wanted, record = set(names), self.record
        for name, parameter in self.base_parameters().items():
            if self._injected.name_seen(name) in wanted and name not in record.trained:
                record.trained.add(name)
                record.unfrozen.add(name)
                record.initial[name] = parameter.detach().clone()

    def kept(self) -> object:
        """Return a copy of what the record keeps of tensors, for put_back."""
        record = self.record
        return set(record.trained), set(record.unfrozen), dict(record.initial)

    def put_back(self, kept: object) -> None:
        """Let the record keep again what it kept when `kept` was called. In place."""
        self.record.trained, self.record.unfrozen, self.record.initial = kept  # type: ignore[misc]


def open_model(model: nn.Module, verb: str) -> AdaptedModel:
    """Return the handle of an injected model.

    Args:
        model: a module that holds all adapted layers, or a wrapper that torch or Lightning put around one.
        verb: what an error begins with.

    Raises:
        LoRAError: the module is not injected, holds a part of the adapted layers, or several injected models.

    Example::

        handle = open_model(model, "save_adapter")
        names = list(handle.layers)
    """
    inner = unwrapped(model, verb)
    return AdaptedModel(inner, require_injection(inner, verb))


def find_model(model: nn.Module) -> AdaptedModel | None:
    """Return the handle of an injected model, or None where nothing is injected.

    Args:
        model: any module, or a wrapper that torch or Lightning put around one.

    Raises:
        LoRAError: the module holds several injected models.
    """
    inner = inside_known_wrappers(model)
    injected = find_injection(inner)
    return None if injected is None else AdaptedModel(inner, injected)
