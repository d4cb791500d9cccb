"""The handle of an injected model: each public function and each hook opens it once and passes it inward.

A handle lists the model's modules and adapters when they are first asked for, and keeps the lists. It is thrown away at
the end of the call.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import NoReturn

import torch
from torch import nn

from ..errors import LoRAError
from ..names import ATTRIBUTE, WRAPPERS, names_factor
from ..nn.adapted_weights import AdaptedWeights, adapted_layers
from ..nn.low_rank import ATTENTION_OUTPUT
from .injection import Injection, Kept, Mark
from .named_state import BaseParameter, Places, StateEntry, base_parameters_of, own_state, state_of
from .wrappers import inside_known_wrappers, unwrapped

KeptTensors = list[tuple[nn.Module, dict[str, torch.Tensor], dict[str, set[str]]]]


class Listing:
    """The modules and adapters in a model, adapted or not. Each list is made at first use and kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def places(self) -> Places:
        """Every module under each of its names, without the segments of wrappers."""
        return list_places(self.model)

    @cached_property
    def modules(self) -> Places:
        """Every module once, under its first name."""
        return _each_once(self.places)

    @cached_property
    def layers(self) -> dict[str, AdaptedWeights]:
        """The adapters of layers and parameters, by name; a shared adapter under its first name."""
        return adapted_layers(self.model, modules=self.modules)

    @cached_property
    def layers_by_every_name(self) -> dict[str, AdaptedWeights]:
        """The adapters of layers and parameters, each under all of its names."""
        return adapted_layers(self.model, remove_duplicate=False, modules=self.places)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The kind (one of low_rank.KINDS) of each adapter with factors, by the adapter's first name."""
        outputs = {id(module.out_proj) for _, module in self.modules if isinstance(module, nn.MultiheadAttention)}
        return {
            name: ATTENTION_OUTPUT if id(layer) in outputs else layer.kind()
            for name, layer in self.layers.items()
            if layer.kind()
        }

    def look_again(self) -> None:
        """Forget the lists, after layers were adapted, replaced or taken out."""
        for name in ("places", "modules", "root_places", "root_modules"):
            vars(self).pop(name, None)
        self.look_for_layers_again()

    def look_for_layers_again(self) -> None:
        """Forget which modules are adapted, after adapters were put in or taken out of the same modules."""
        for name in ("layers", "layers_by_every_name", "kinds"):
            vars(self).pop(name, None)

    def state(self) -> list[StateEntry]:
        """Return each name of model.state_dict() with its live tensor and owner; see state_of."""
        return list(state_of(self.places))


class AdaptedModel(Listing):
    """An injected model, seen from the module that a caller gave.

    Attributes:
        model: the caller's module without wrappers around it. It holds all adapted layers.
        root: the injected module: `model`, a module inside `model`, or a module that holds `model`.
        record: the record of the injection.
        prefix: the root's name in `model` with a dot at the end, where the root lies inside `model`; else "".
        inside: the name of `model` in the root with a dot at the end, where `model` lies inside the root; else "".
    """

    def __init__(
        self, model: nn.Module, root: nn.Module, record: Injection, *, prefix: str = "", inside: str = ""
    ) -> None:
        super().__init__(model)
        self.root, self.record, self.prefix, self.inside = root, record, prefix, inside

    @cached_property
    def root_places(self) -> Places:
        """Every module of the root under each of its names in the root."""
        if self.root is self.model:
            return self.places
        if self.inside:
            return Listing(self.root).places
        name = self.prefix.removesuffix(".")
        return [(n.removeprefix(self.prefix) if n != name else "", m) for n, m in self.places if is_inside(n, name)]

    @cached_property
    def root_modules(self) -> Places:
        """Every module of the root once, under its first name in the root."""
        return self.modules if self.root is self.model else _each_once(self.root_places)

    def base(self) -> list[BaseParameter]:
        """Return the root's parameters without adapters, each once, with its first name in the root."""
        return base_parameters_of(self.root_modules)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Return the root's parameters without adapters, each once, by its first name in the root."""
        return {each.name: each.parameter for each in self.base()}

    def marked(self, mark: Mark) -> set[int]:
        """Return the id of each of the root's base parameters that has a mark."""
        found = set()
        for _, module in self.root_modules:
            leaves = [leaf for leaf, marks in self.record.marks(module).items() if mark in marks]
            own = own_state(module) if leaves else {}
            found |= {id(own[leaf]) for leaf in leaves if leaf in own}
        return found

    def scope(self) -> str:
        """Return the beginning of the names in `model` for which the options count, "" or ending in a dot."""
        return scope_in(self.places, self.record) or self.prefix

    def left_out(self) -> dict[str, str]:
        """Return why "all-linear" or "all-layers" leaves a layer out, by the layer's name."""
        kept = ((name, self.record.kept(module)) for name, module in self.modules)
        return {name: each["left_out"] for name, each in kept if each is not None and "left_out" in each}

    def initial(self) -> dict[str, torch.Tensor]:
        """Return the recorded values from before training of trained base parameters and persistent buffers, by name.

        A parameter is listed under its first name, a buffer under each of its names.
        """
        found, parameters = {}, set()
        for name, tensor, module in self.state():
            value = self.record.initial(module).get(name.rpartition(".")[2])
            if value is None or id(tensor) in parameters:
                continue
            found[name] = value
            if isinstance(tensor, nn.Parameter):
                parameters.add(id(tensor))
        return found

    def initial_of(self, mark: Mark) -> dict[str, torch.Tensor]:
        """Return the values from before training of base parameters with a mark, each under all of its names."""
        wanted, values = self.marked(mark), dict[int, torch.Tensor]()
        for _, module in self.root_modules if wanted else ():
            own = own_state(module)
            for leaf, value in self.record.initial(module).items():
                if leaf in own and id(own[leaf]) in wanted:
                    values.setdefault(id(own[leaf]), value)
        return {name: values[id(tensor)] for name, tensor, _ in self.state() if id(tensor) in values}

    def set_initial(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace all recorded values from before training by these, given by name."""
        for _, module in self.root_modules:
            self.record.forget_initial(module)
        done = set()
        for name, tensor, module in self.state():
            if name in values and id(tensor) not in done:
                done.add(id(tensor))
                self.record.keep_initial(module, {name.rpartition(".")[2]: values[name]})

    def record_trainable(self, *, expected: bool = False, untouched: bool = False) -> list[nn.Parameter]:
        """Record every base parameter that has become trainable, and return these parameters.

        Args:
            expected: the options ask for these parameters. Otherwise a warning names them.
            untouched: no optimizer has stepped since, so that the present values are those from before training.
        """
        new = self._newly_trainable()
        for each in new:
            marks: tuple[Mark, ...] = () if expected else ("unfrozen", "untold")
            first = each.parameter if expected or untouched else None
            self.record.add_trained(each.module, each.leaf, first, *marks)
        untold = self.marked("untold")
        told = [each for each in self.base() if id(each.parameter) in untold] if untold else []
        for each in told:
            self.record.take_mark(each.module, each.leaf, "untold")
        if told and not expected:
            shown = ", ".join(each.name for each in told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")
            warnings.warn(
                f"lightning_lora: base parameters were unfrozen after injection ({shown}); they are saved with the "
                "adapter.",
                stacklevel=2,
            )
        return [each.parameter for each in new]

    def without_first_values(self) -> list[str]:
        """Return the names of base parameters that may have been trained and whose values from before are not known."""
        if not any(self._may_lack_values(module) for _, module in self.root_modules):
            return []
        trained, known = self.marked("trained"), set[int]()
        for _, module in self.root_modules:
            leaves = self.record.initial(module)
            own = own_state(module) if leaves else {}
            known |= {id(own[leaf]) for leaf in leaves if leaf in own}
        base = ((each.name, id(each.parameter), each.parameter.requires_grad) for each in self.base())
        return [name for name, key, trains in base if (trains or key in trained) and key not in known]

    def _may_lack_values(self, module: nn.Module) -> bool:
        """Return whether a module's own parameters may lack values from before training: at once, without a list."""
        kept = self.record.kept(module) or Kept()
        initial, marks = kept.get("initial", {}), kept.get("marks", {})
        for leaf, live in module._parameters.items():
            may_be_trained = live is not None and (live.requires_grad or leaf in marks)
            if may_be_trained and leaf not in initial and not names_factor(leaf):
                return True
        return False

    def _newly_trainable(self) -> list[BaseParameter]:
        trained = self.marked("trained")
        return [each for each in self.base() if each.parameter.requires_grad and id(each.parameter) not in trained]

    def record_unfrozen(self, names: Collection[str]) -> None:
        """Record base parameters that another run had unfrozen, with their present values as those before training.

        Parameters that are recorded already are passed over, and so are names that are no base parameter's.
        """
        trained, names_here = self.marked("trained"), dict[int, str]()
        for name, tensor, _ in self.state():
            names_here.setdefault(id(tensor), name)
        for each in self.base():
            if names_here.get(id(each.parameter), "") in names and id(each.parameter) not in trained:
                self.record.add_trained(each.module, each.leaf, each.parameter, "unfrozen")

    def kept(self) -> KeptTensors:
        """Return a copy of the recorded values and marks, for put_back."""
        record, modules = self.record, [module for _, module in self.root_modules]
        return [
            (module, dict(record.initial(module)), {leaf: set(marks) for leaf, marks in record.marks(module).items()})
            for module in modules
        ]

    def put_back(self, earlier: KeptTensors) -> None:
        """Restore the recorded values and marks that kept() returned. In place."""
        for module, initial, marks in earlier:
            self.record.forget_initial(module)
            self.record.keep_initial(module, initial)
            self.record.keep_marks(module, marks)


def open_model(model: nn.Module, verb: str) -> AdaptedModel:
    """Return the handle of an injected model.

    Args:
        model: a module that holds all adapted layers, or a wrapper of torch or Lightning around such a module.
        verb: the beginning of an error's message.

    Raises:
        LoRAError: the module is not injected, holds only a part of the adapted layers, or holds several injected
            models.

    Example::

        handle = open_model(model, "save_adapter")
        names = list(handle.layers)
    """
    listing = Listing(unwrapped(model, verb))
    handle = find_in(listing)
    if handle is None and listing.layers:
        _refuse_part(listing, verb)
    if handle is None:
        raise LoRAError(
            f"{verb}: {type(listing.model).__name__} was not injected; call inject(model, LoRAConfig(...)) first, or "
            "pass the module that inject was called on."
        )
    return handle


def find_model(model: nn.Module) -> AdaptedModel | None:
    """Return the handle of an injected model, or None where nothing is injected.

    Args:
        model: any module, or a wrapper of torch or Lightning around a module.

    Raises:
        LoRAError: the module holds several injected models.

    Example::

        handle = find_model(model)
        is_injected = handle is not None
    """
    return find_in(Listing(inside_known_wrappers(model)))


def find_in(listing: Listing) -> AdaptedModel | None:
    """Return the handle of a listed model, or None where it holds no adapted layer or only a part of them.

    The modules are not listed where the model is the injected module itself.

    Raises:
        LoRAError: the module holds several injected models.
    """
    model = listing.model
    if ATTRIBUTE in vars(model):
        return _with_lists(AdaptedModel(model, model, vars(model)[ATTRIBUTE]), listing)
    roots = {name: module for name, module in listing.modules if ATTRIBUTE in vars(module)}
    layers = listing.layers
    records = [vars(root)[ATTRIBUTE] for root in roots.values()] + [layer.lora.injection for layer in layers.values()]
    if len({id(record) for record in records}) > 1:
        names = ", ".join(map(repr, roots or layers))
        raise LoRAError(f"{type(model).__name__}: holds several injected models ({names}); handle each by itself.")
    if roots:
        name, root = next(iter(roots.items()))
        return _with_lists(AdaptedModel(model, root, records[0], prefix=f"{name}." if name else ""), listing)
    return _find_by_layers(listing, records[0]) if layers else None


def _find_by_layers(listing: Listing, record: Injection) -> AdaptedModel | None:
    """Return the handle of a model that does not hold the injected module.

    The model lies inside the injected module, or it is a new module around the same layers.
    """
    model, root = listing.model, record.holder()
    if root is not None:
        outer = Listing(root)
        if set(outer.layers.values()) - set(listing.layers.values()):
            return None
        names = [name for name, module in outer.places if module is model]
        if names:
            handle = AdaptedModel(model, root, record, inside=f"{names[0]}." if names[0] else "")
            handle.root_places = outer.places
            return _with_lists(handle, listing)
    return _with_lists(AdaptedModel(model, model, record), listing)


def _with_lists(handle: AdaptedModel, listing: Listing) -> AdaptedModel:
    """Give a handle the lists that were made to find it, and return it."""
    vars(handle).update({name: value for name, value in vars(listing).items() if name != "model"})
    return handle


def _refuse_part(listing: Listing, verb: str) -> NoReturn:
    """Raise LoRAError for a module that holds only a part of the layers that were adapted together."""
    layers = listing.layers
    root = next(iter(layers.values())).lora.injection.holder()
    all_layers = adapted_layers(root)
    other = next(name for name, layer in all_layers.items() if layer not in layers.values())
    raise LoRAError(
        f"{verb}: {type(listing.model).__name__} holds {len(layers)} of the {len(all_layers)} layers that were adapted "
        f"through {type(root).__name__}, and not {other!r}; pass that {type(root).__name__}, or a module that holds "
        "them all."
    )


def scope_in(places: Places, record: Injection) -> str:
    """Return the beginning of the names for which the options of an injection count, "" or ending in a dot."""
    for name, module in places:
        kept = record.kept(module)
        if kept is not None and "scope" in kept:
            return f"{name}." if name else ""
    return ""


def list_places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module of a model under each of its names, without the segments of wrappers.

    The same as named_modules(remove_duplicate=False), in less time.
    """
    places: list[tuple[str, nn.Module]] = []
    _append_places(model, "", places)
    return places


def _append_places(module: nn.Module, name: str, places: list[tuple[str, nn.Module]]) -> None:
    """Append a module and what is in it. No closure: one that calls itself keeps the model until garbage collection."""
    places.append((name, module))
    path = f"{name}." if name else ""
    for segment, child in module._modules.items():
        if child is not None:
            _append_places(child, name if segment in WRAPPERS else path + segment, places)


def _each_once(places: Places) -> Places:
    first: dict[nn.Module, str] = {}
    for name, module in places:
        first.setdefault(module, name)
    return [(name, module) for module, name in first.items()]


def is_inside(name: str, outer: str) -> bool:
    """Return whether a name is the module `outer` or lies inside it."""
    return not outer or name == outer or name.startswith(f"{outer}.")
