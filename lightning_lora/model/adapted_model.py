"""The handle of an injected model: each public function and each hook opens it once and passes it inward.

A handle lists the model's modules and adapters when they are first asked for, and keeps the lists. It is thrown away at
the end of the call. It also translates between names in the caller's module and the names in the record.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import NoReturn

import torch
from torch import nn

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import copy_of
from ..errors import LoRAError
from ..names import ATTRIBUTE, WRAPPERS, join_names, names_factor, suffixes
from ..nn.adapted_weights import AdaptedWeights, adapted_layers, adapted_places
from ..nn.low_rank import ATTENTION_OUTPUT
from .injection import Injection, Why
from .named_state import BaseParameter, Places, StateEntry, base_parameters_of, own_state, state_of
from .wrappers import inside_known_wrappers, unwrapped

NEW = "new:"  # before the record's names of what a new module around the layers has beside them


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
    def all_layers(self) -> dict[str, AdaptedWeights]:
        """The layers and parameters in which an adapter acts, trained or attached; a shared one by its first name."""
        return adapted_layers(self.model, modules=self.modules)

    @cached_property
    def layers(self) -> dict[str, AdaptedWeights]:
        """The layers and parameters that have a trained adapter, by name; a shared one by its first name."""
        return {name: layer for name, layer in self.all_layers.items() if layer.is_trained()}

    @cached_property
    def layers_by_every_name(self) -> dict[str, AdaptedWeights]:
        """The layers and parameters that have a trained adapter, each under all of its names."""
        every = adapted_layers(self.model, remove_duplicate=False, modules=self.places)
        return {name: layer for name, layer in every.items() if layer.is_trained()}

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The kind (one of low_rank.KINDS) of each trained adapter with factors, by the adapter's first name."""
        return self.kinds_of(self.layers)

    def kinds_of(self, layers: Mapping[str, AdaptedWeights]) -> dict[str, str]:
        """Return the kind of each of some layers or parameters with factors, by name."""
        outputs = {id(module.out_proj) for _, module in self.modules if isinstance(module, nn.MultiheadAttention)}
        return {
            name: ATTENTION_OUTPUT if id(layer) in outputs else layer.kind()
            for name, layer in layers.items()
            if layer.kind()
        }

    def look_again(self) -> None:
        """Forget the lists, after layers were adapted, replaced or taken out."""
        for name in ("places", "modules", "root_places", "root_modules", "recorded_modules"):
            vars(self).pop(name, None)
        self.look_for_layers_again()

    def look_for_layers_again(self) -> None:
        """Forget which modules are adapted, after adapters were put in or taken out of the same modules."""
        for name in ("all_layers", "layers", "layers_by_every_name", "kinds"):
            vars(self).pop(name, None)

    def state(self) -> list[StateEntry]:
        """Return each name of model.state_dict() with its live tensor and owner; see state_of."""
        return list(state_of(self.places))


class AdaptedModel(Listing):
    """An injected model, seen from the module that a caller gave.

    Attributes:
        model: the caller's module without wrappers around it. It holds all adapted layers.
        root: the injected module: `model`, a module inside `model`, or a module that holds `model`. Where a new module
            was built around the layers, it is `model`.
        record: the record of the injection.
        prefix: the root's name in `model` with a dot at the end, where the root lies inside `model`; else "".
        inside: the name of `model` in the root with a dot at the end, where `model` lies inside the root; else "".
        moved: what the names of a new module around the layers begin with, and what they began with at injection.
    """

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        record: Injection,
        *,
        prefix: str = "",
        inside: str = "",
        moved: tuple[str, str] = ("", ""),
    ) -> None:
        super().__init__(model)
        self.root, self.record, self.prefix, self.inside, self.moved = root, record, prefix, inside, moved

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

    @cached_property
    def recorded_modules(self) -> dict[str, nn.Module]:
        """The root's modules by the names that the record has for them."""
        return {self.recorded_name(name): module for name, module in self.root_places}

    def recorded_name(self, name: str) -> str:
        """Return the record's name for a name in the root: that at injection, or one with NEW before it."""
        now, then = self.moved
        if not now and not then:
            return name
        if not is_inside(name, now):
            return NEW + name
        rest = name[len(now) :].removeprefix(".") if now else name
        return join_names(then, rest)

    def name_at_injection(self, name: str) -> str | None:
        """Return the record's name for a name in `model`, or None where it lies outside of the root."""
        if self.prefix and not name.startswith(self.prefix):
            return None
        return self.recorded_name(name.removeprefix(self.prefix) if self.prefix else self.inside + name)

    def name_here(self, recorded: str) -> str | None:
        """Return the name in `model` for a name at injection, or None where it lies outside of `model`."""
        now, then = self.moved
        if not is_inside(recorded, then) or not f"{recorded}.".startswith(self.inside):
            return None
        rest = recorded[len(then) :].removeprefix(".") if then else recorded
        name = join_names(now, rest)
        return (self.prefix + name).removesuffix(".") if self.prefix else f"{name}.".removeprefix(self.inside)[:-1]

    def base(self) -> list[BaseParameter]:
        """Return the root's parameters without adapters, each once, with its first name in the root."""
        return base_parameters_of(self.root_modules)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Return the root's parameters without adapters, each once, by its first name in the root."""
        return {each.name: each.parameter for each in self.base()}

    def recorded_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each of these names at injection that a tensor of the root still has, with the live tensor."""
        own: dict[str, dict[str, torch.Tensor]] = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            if path not in own:
                module = self.recorded_modules.get(path)
                own[path] = own_state(module) if module is not None else {}
            if leaf in own[path]:
                yield name, own[path][leaf]

    def trained(self, *why: Why) -> set[int]:
        """Return the id of each of the root's base parameters that is recorded as trained, for any of these reasons."""
        names = (name for name, reason in self.record.trained.items() if not why or reason in why)
        return {id(tensor) for _, tensor in self.recorded_tensors(names)}

    def scope(self) -> str:
        """Return the beginning of the names in `model` for which the options count, "" or ending in a dot."""
        scope = self.record.chosen.scope if self.record.chosen is not None else ""
        name = self.name_here(scope.removesuffix(".")) if scope else None
        return self.prefix if name is None else f"{name}." if name else ""

    def left_out(self) -> dict[str, str]:
        """Return why "all-linear" or "all-layers" leaves a layer out, by the layer's name."""
        named = ((self.name_here(name), reason) for name, reason in self.record.left_out.items())
        return {name: reason for name, reason in named if name is not None}

    def initial(self) -> dict[str, torch.Tensor]:
        """Return the recorded values from before training of trained base parameters and persistent buffers, by name.

        A parameter is listed under its first name, a buffer under each of its names.
        """
        values, found, parameters = self._initial_by_id(), dict[str, torch.Tensor](), set()
        for name, tensor, _ in self.state() if values else ():
            if id(tensor) not in values or id(tensor) in parameters:
                continue
            found[name] = values[id(tensor)]
            if isinstance(tensor, nn.Parameter):
                parameters.add(id(tensor))
        return found

    def initial_of(self, *why: Why) -> dict[str, torch.Tensor]:
        """Return the values from before training of base parameters, each under all of its names; see trained."""
        wanted = self.trained(*why)
        values = {key: value for key, value in self._initial_by_id().items() if key in wanted} if wanted else {}
        return {name: values[id(tensor)] for name, tensor, _ in self.state() if id(tensor) in values} if values else {}

    def forget_modules(self, modules: Collection[nn.Module]) -> None:
        """Forget what is recorded of the tensors of modules, which were built in the place of others. In place."""
        record = self.record
        for path, module in self.recorded_modules.items() if modules else ():
            for leaf in (*module._parameters, *module._buffers) if module in modules else ():
                for facts in (record.requires_grad, record.trained, record.initial):
                    facts.pop(join_names(path, leaf), None)

    def first_values(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each live tensor of the root that has a recorded value from before training, and this value.

        A tensor of another shape came in the place of the one that was recorded, and has none.
        """
        initial = self.record.initial
        for name, tensor in self.recorded_tensors(initial):
            if unsharded_shape(tensor) == unsharded_shape(initial[name]):
                yield tensor, initial[name]

    def _initial_by_id(self) -> dict[int, torch.Tensor]:
        return {id(tensor): value for tensor, value in self.first_values()}

    def set_initial(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace all recorded values from before training by these, given by name in `model`."""
        tensors = {name: tensor for name, tensor, _ in self.state() if name in values}
        by_id = {id(tensor): values[name] for name, tensor in reversed(tensors.items())}
        self.record.initial = {}
        for path, module in self.recorded_modules.items():
            for leaf, tensor in own_state(module).items():
                if id(tensor) in by_id:
                    self.record.initial[join_names(path, leaf)] = by_id.pop(id(tensor))

    def record_trainable(self, *, expected: bool = False, untouched: bool = False) -> list[nn.Parameter]:
        """Record every base parameter that has become trainable, and return these parameters.

        Args:
            expected: the options ask for these parameters. Otherwise a warning names them.
            untouched: no optimizer has stepped since, so that the present values are those from before training.
        """
        if not self.record.is_injection:
            return []
        trained = self.trained()
        new = [each for each in self.base() if each.parameter.requires_grad and id(each.parameter) not in trained]
        for each in new:
            self.add_trained(each, "asked" if expected else "unfrozen", keep=expected or untouched)
        if new and not expected:
            shown = ", ".join(each.name for each in new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
            warnings.warn(
                f"lightning_lora: base parameters were unfrozen after injection ({shown}); they are saved with the "
                "adapter.",
                stacklevel=2,
            )
        return [each.parameter for each in new]

    def add_trained(self, each: BaseParameter, why: Why, *, keep: bool) -> None:
        """Record that a base parameter of the root is trained; `keep` its present value as that from before."""
        name = self.recorded_name(each.name)
        self.record.trained[name] = why
        if keep:
            self.record.initial[name] = copy_of(each.parameter)

    def without_first_values(self) -> list[str]:
        """Return the names of base parameters that may have been trained and whose values from before are not known."""
        if not self.record.is_injection:
            return []
        are_known = self.record.initial.keys() >= self.record.trained.keys()
        if are_known and not any(self.moved) and not self._trains_unknown():
            return []
        trained, known = self.trained(), set(self._initial_by_id())
        base = ((each.name, id(each.parameter), each.parameter.requires_grad) for each in self.base())
        return [name for name, key, trains in base if (trains or key in trained) and key not in known]

    def _trains_unknown(self) -> bool:
        """Return whether a trainable parameter has no recorded value: at once, where base() lists them all."""
        for path, module in self.root_modules:
            for leaf, live in module._parameters.items():
                if live is not None and live.requires_grad and not names_factor(leaf):
                    name = join_names(path, leaf)
                    value = self.record.initial.get(name)
                    if value is None or unsharded_shape(value) != unsharded_shape(live):
                        return True
        return False

    def record_unfrozen(self, names: Collection[str]) -> None:
        """Record base parameters that another run had unfrozen, with their present values as those before training.

        Parameters that are recorded already are passed over, and so are names that are no base parameter's.
        """
        trained, names_here = self.trained(), dict[int, str]()
        for name, tensor, _ in self.state():
            names_here.setdefault(id(tensor), name)
        for each in self.base():
            if names_here.get(id(each.parameter), "") in names and id(each.parameter) not in trained:
                self.add_trained(each, "unfrozen", keep=True)

    def gone(self) -> tuple[list[str], int]:
        """Return the names at injection of adapted layers that are not there any more, and how many there were."""
        (_, then), holder = self.moved, self.record.holder()
        elsewhere = {} if holder in (None, self.root) else adapted_layers(holder)  # a new module is around a part
        layers = [*self.all_layers.values(), *elsewhere.values()]
        live = {layer.lora.name for layer in layers if layer.lora.injection is self.record}
        live |= {self.name_at_injection(name) or "" for name, _, _ in adapted_places(self.model, modules=self.modules)}
        expected = [name for name in self.record.layers if is_inside(name, then)]
        return [name for name in expected if name not in live], len(expected)


def open_model(model: nn.Module, verb: str, *, attached: bool = False) -> AdaptedModel:
    """Return the handle of an injected model.

    Args:
        model: a module that holds all adapted layers, or a wrapper of torch or Lightning around such a module.
        verb: the beginning of an error's message.
        attached: take a model with attached adapters alone, too.

    Raises:
        LoRAError: the module is not injected, holds only a part of the adapted layers, or holds several injected
            models.

    Example::

        handle = open_model(model, "save_adapter")
        names = list(handle.layers)
    """
    listing = Listing(unwrapped(model, verb))
    handle = find_model(listing, attached=attached)
    if handle is None and (listing.all_layers if attached else listing.layers):
        _refuse_part(listing, verb)
    if handle is None:
        raise LoRAError(
            f"{verb}: {type(listing.model).__name__} was not injected; call inject(model, LoRAConfig(...)) first, or "
            "pass the module that inject was called on."
        )
    return handle


def find_model(model: nn.Module | Listing, *, part: bool = False, attached: bool = False) -> AdaptedModel | None:
    """Return the handle of an injected model, or None where it holds no adapted layer or only a part of them.

    Args:
        model: any module, or a wrapper of torch or Lightning around a module; or the listing of a module.
        part: also return the handle of a part of an injected model.
        attached: also return the handle of a model with attached adapters alone, which was not injected.

    Raises:
        LoRAError: the module holds several injected models.

    Example::

        handle = find_model(model)
        is_injected = handle is not None
    """
    listing = model if isinstance(model, Listing) else Listing(inside_known_wrappers(model))
    handle = _find(listing, part)
    return handle if handle is None or attached or handle.record.is_injection else None


def _find(listing: Listing, part: bool) -> AdaptedModel | None:
    model = listing.model
    if ATTRIBUTE in vars(model):
        return with_lists(AdaptedModel(model, model, vars(model)[ATTRIBUTE]), listing)
    roots = {name: module for name, module in listing.modules if ATTRIBUTE in vars(module)}
    layers = listing.all_layers
    records = [vars(root)[ATTRIBUTE] for root in roots.values()] + [layer.lora.injection for layer in layers.values()]
    if len({id(record) for record in records}) > 1:
        names = ", ".join(map(repr, roots or layers))
        raise LoRAError(f"{type(model).__name__}: holds several injected models ({names}); handle each by itself.")
    if roots:
        name, root = next(iter(roots.items()))
        return with_lists(AdaptedModel(model, root, records[0], prefix=f"{name}." if name else ""), listing)
    return _find_by_layers(listing, records[0], part) if layers else None


def _find_by_layers(listing: Listing, record: Injection, part: bool) -> AdaptedModel | None:
    """Return the handle of a model that does not hold the injected module.

    The model lies inside the injected module, or it is a new module around the same layers. None where it holds a part
    of the layers, unless `part` allows that.
    """
    model, root = listing.model, record.holder()
    if root is not None:
        outer = Listing(root)
        if not part and set(outer.all_layers.values()) - set(listing.all_layers.values()):
            return None
        names = [name for name, module in outer.places if module is model]
        if names:
            handle = AdaptedModel(model, root, record, inside=f"{names[0]}." if names[0] else "")
            handle.root_places = outer.places
            return with_lists(handle, listing)
    return with_lists(AdaptedModel(model, model, record, moved=moved_names(listing, record)), listing)


def moved_names(listing: Listing, record: Injection) -> tuple[str, str]:
    """Return what the names of most of a record's layers begin with now, and what they began with at injection.

    A copy of a part of a model and a new module around its network have other names for the same layers.
    """
    names = ((name, layer.lora.name) for name, layer in listing.all_layers.items() if layer.lora.injection is record)
    ways = Counter(_without_common_end(now, then) for now, then in names)
    return ways.most_common(1)[0][0]


def _without_common_end(now: str, then: str) -> tuple[str, str]:
    """Return two names without the segments in which both end: "net.a.b" and "model.net2.a.b" give net, model.net2."""
    ends = suffixes(then)
    common = next((end for end in suffixes(now) if end in ends), "")
    if not common:
        return now, then
    return now.removesuffix(common).removesuffix("."), then.removesuffix(common).removesuffix(".")


def with_lists(handle: AdaptedModel, listing: Listing) -> AdaptedModel:
    """Give a handle the lists that were made to find it, and return it."""
    vars(handle).update({name: value for name, value in vars(listing).items() if name != "model"})
    return handle


def _refuse_part(listing: Listing, verb: str) -> NoReturn:
    """Raise LoRAError for a module that holds only a part of the layers that were adapted together."""
    layers = listing.all_layers
    root = next(iter(layers.values())).lora.injection.holder()
    all_layers = adapted_layers(root)
    other = next(name for name, layer in all_layers.items() if layer not in layers.values())
    raise LoRAError(
        f"{verb}: {type(listing.model).__name__} holds {len(layers)} of the {len(all_layers)} layers that were adapted "
        f"through {type(root).__name__}, and not {other!r}; pass that {type(root).__name__}, or a module that holds "
        "them all."
    )


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
