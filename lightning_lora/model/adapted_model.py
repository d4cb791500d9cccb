"""The handle of an injected model: each public function and each hook opens it once and passes it inward.

A handle lists the model's modules and adapters when they are first asked for, and keeps the lists. It is thrown away at
the end of the call.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import nn

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import copy_of
from ..errors import LoRAError
from ..names import INJECTION_ATTRIBUTE, WRAPPERS
from ..nn.adapted_module import NamedModules, adapted_layers, is_factor
from ..nn.adapted_weights import AdaptedWeights
from ..nn.low_rank import ATTENTION_OUTPUT
from .facts import Fact, Known, Why, facts_of, known_tensors, memory_of
from .injection import Injection
from .named_state import BaseParameter, StateEntry, base_parameters_of, state_of
from .wrappers import inside_known_wrappers, unwrapped


class Listing:
    """The modules and adapters in a model, adapted or not. Each list is made at first use and kept."""

    copies: tuple[str, ...] = ()  # the names, with a dot, of modules that are left out: see AdaptedModel

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def places(self) -> NamedModules:
        """Every module under each of its names, without the segments of wrappers."""
        return list_places(self.model)

    @cached_property
    def modules(self) -> NamedModules:
        """Every module once, under its first name."""
        return _each_once(self.places)

    @cached_property
    def all_layers(self) -> dict[str, AdaptedWeights]:
        """The layers and parameters in which an adapter acts, trained or attached; a shared one by its first name."""
        return adapted_layers(self.model, modules=self.modules)

    @cached_property
    def layers(self) -> dict[str, AdaptedWeights]:
        """The layers and parameters that have a trained adapter, by name; a shared one by its first name."""
        return {name: layer for name, layer in self.all_layers.items() if layer.has_trained_adapter()}

    @cached_property
    def layers_by_every_name(self) -> dict[str, AdaptedWeights]:
        """The layers and parameters that have a trained adapter, each under all of its names."""
        every = adapted_layers(self.model, remove_duplicate=False, modules=self.places)
        return {name: layer for name, layer in every.items() if layer.has_trained_adapter()}

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
        for name in [*vars(self)]:
            if isinstance(getattr(type(self), name, None), cached_property):
                del vars(self)[name]

    def look_for_layers_again(self) -> None:
        """Forget which modules are adapted, after adapters were put in or taken out of the same modules."""
        for name in ("all_layers", "layers", "layers_by_every_name", "kinds"):
            vars(self).pop(name, None)

    def state(self) -> list[StateEntry]:
        """Return each name of model.state_dict() with its live tensor and owner; see state_of."""
        return list(state_of(self.places))

    def base_keys(self) -> list[str]:
        """Return the names of the plain model's state dict."""
        return [name for name, _, owner in self.state() if not is_factor(name, owner)]


class AdaptedModel(Listing):
    """An injected model, seen from the module that a caller gave.

    A frozen copy of an adapted network in the model, such as the baseline of a policy, is no part of what is trained:
    it is left out of the lists, of adapters and of checkpoints. A copy that is trained counts.

    Attributes:
        model: the caller's module without wrappers around it. It holds all adapted layers.
        root: the injected module: `model`, a module inside `model`, or a module that holds `model`. Where a new module
            was built around the layers, it is `model`.
        injection: the injection.
        prefix: the root's name in `model` with a dot at the end, where the root lies inside `model`; else "".
        inside: the name of `model` in the root with a dot at the end, where `model` lies inside the root; else "".
    """

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        injection: Injection,
        *,
        prefix: str = "",
        inside: str = "",
    ) -> None:
        super().__init__(model)
        self.root = root
        self.injection = injection
        self.prefix = prefix
        self.inside = inside

    @cached_property
    def places(self) -> NamedModules:
        """Every module under each of its names, without frozen copies and the segments of wrappers."""
        places = list_places(self.model)
        others = _frozen_injections(places) - {self.injection}
        if not others:
            return places
        known = [(module, facts_of(module)) for _, module in places]
        is_copy = {module: facts is not None and facts.injection in others for module, facts in known}
        self.copies = tuple(f"{name}." for name, module in places if is_copy[module])
        return [(name, module) for name, module in places if not is_copy[module]]

    @cached_property
    def root_places(self) -> NamedModules:
        """Every module of the root under each of its names in the root."""
        if self.root is self.model:
            return self.places
        if self.inside:
            return AdaptedModel(self.root, self.root, self.injection).places
        name = self.prefix.removesuffix(".")
        return [(n.removeprefix(self.prefix) if n != name else "", m) for n, m in self.places if is_inside(n, name)]

    @cached_property
    def root_modules(self) -> NamedModules:
        """Every module of the root once, under its first name in the root."""
        return self.modules if self.root is self.model else _each_once(self.root_places)

    def base(self) -> list[BaseParameter]:
        """Return the root's parameters without adapters, each once, with its first name in the root."""
        return base_parameters_of(self.root_modules)

    @property
    def outer_places(self) -> NamedModules:
        """Every module of the model or of the root, whichever holds the other, under each of its names there."""
        return self.places if self.prefix else self.root_places

    def all_modules(self) -> list[nn.Module]:
        """Return the modules of the model or of the root, whichever holds the other, each once."""
        return list(dict.fromkeys(module for _, module in self.outer_places))

    @cached_property
    def known(self) -> dict[int, Known]:
        """Each live tensor of which something is known, with what it is, by the tensor's id; see facts.py."""
        return known_tensors(self.all_modules(), self.injection.facts)

    def fact(self, module: nn.Module, leaf: str, tensor: torch.Tensor) -> Fact:
        """Return what is known of a tensor, to add to it: a new fact where nothing is.

        Args:
            module: that has the tensor.
            leaf: its name there.
            tensor: the live tensor.
        """
        if id(tensor) not in self.known:
            fact = Fact(memory=memory_of(tensor))
            self.injection.facts.append(fact)
            if (facts := facts_of(module)) is not None:
                facts.tensors[leaf] = fact
            self.known[id(tensor)] = Known(tensor, fact)
        return self.known[id(tensor)].fact

    def trained(self, *why: Why) -> set[int]:
        """Return the id of each base parameter that is recorded as trained, for any of these reasons."""
        return {
            key
            for key, (_, fact) in self.known.items()
            if fact.trained is not None and (not why or fact.trained in why)
        }

    def scope(self) -> str:
        """Return the beginning of the names in `model` for which the options count, "" or ending in a dot."""
        for name, module in self.places:
            facts = facts_of(module)
            if facts is not None and facts.is_scope:
                return f"{name}." if name else ""
        return self.prefix

    def left_out(self) -> dict[str, str]:
        """Return why "all-linear" or "all-layers" leaves a layer out, by the layer's name."""
        known = ((name, facts_of(module)) for name, module in self.places)
        return {name: facts.left_out for name, facts in known if facts is not None and facts.left_out}

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

    def initial_values(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each live tensor that has a recorded value from before training, and this value.

        A tensor of another shape came in the place of the one that was recorded, and has none.
        """
        for tensor, fact in self.known.values():
            if fact.initial is not None and unsharded_shape(tensor) == unsharded_shape(fact.initial):
                yield tensor, fact.initial

    def _initial_by_id(self) -> dict[int, torch.Tensor]:
        return {id(tensor): value for tensor, value in self.initial_values()}

    def set_initial(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace all recorded values from before training by these, given by name in `model`."""
        for _, fact in self.known.values():
            fact.initial = None
        for name, tensor, module in self.state():
            if name in values and tensor is not None:
                self.fact(module, name.rpartition(".")[2], tensor).initial = values[name]

    def fingerprint(self) -> dict[str, Any]:
        """Return the entries of the base's fingerprint that were recorded at fit start, by name in `model`.

        It is empty where `model` is a part of what they were recorded of: each part has a fingerprint of its own.
        """
        entries = {key: fact.entry for key, (_, fact) in self.known.items() if fact.entry is not None}
        found = {name: id(tensor) for name, tensor, _ in self.state() if id(tensor) in entries} if entries else {}
        if entries.keys() > set(found.values()):
            return {}
        return {name: entries[key] for name, key in found.items()}

    def set_fingerprint(self, entries: Mapping[str, Any]) -> None:
        """Replace the recorded fingerprint of the base by these entries, given by name in `model`."""
        for _, fact in self.known.values():
            fact.entry = None
        for name, tensor, module in self.state() if entries else ():
            if name in entries and tensor is not None:
                self.fact(module, name.rpartition(".")[2], tensor).entry = entries[name]

    def record_trainable(self, *, expected: bool = False, untouched: bool = False) -> list[nn.Parameter]:
        """Record every base parameter that has become trainable, and return these parameters.

        Args:
            expected: the options ask for these parameters. Otherwise a warning names them.
            untouched: no optimizer has stepped since, so that the present values are those from before training.
        """
        if not self.injection.has_trained_adapter:
            return []
        trained = self.trained()
        new = [each for each in self.base() if each.parameter.requires_grad and id(each.parameter) not in trained]
        for each in new:
            self.record_as_trained(each, "asked" if expected else "unfrozen", keep=expected or untouched)
        if new and not expected:
            shown = ", ".join(each.name for each in new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
            warnings.warn(
                f"lightning_lora: base parameters were unfrozen after injection ({shown}); they are saved with the "
                "adapter.",
                stacklevel=2,
            )
        return [each.parameter for each in new]

    def record_as_trained(self, each: BaseParameter, why: Why, *, keep: bool) -> None:
        """Record that a base parameter of the root is trained; `keep` its present value as that from before."""
        fact = self.fact(each.module, each.leaf, each.parameter)
        fact.trained = why
        self.injection.trained_count += 1
        if keep:
            fact.initial = copy_of(each.parameter)

    def without_initial_values(self) -> list[str]:
        """Return the names of base parameters that may have been trained and whose values from before are not known."""
        if not self.injection.has_trained_adapter:
            return []
        trained = self.trained()
        initial = set(self._initial_by_id())
        base = ((each.name, id(each.parameter), each.parameter.requires_grad) for each in self.base())
        return [name for name, key, trains in base if (trains or key in trained) and key not in initial]

    def record_unfrozen(self, names: Collection[str]) -> None:
        """Record base parameters that another run had unfrozen, with their present values as those before training.

        Parameters that are recorded already are left alone, and so are names that are no base parameter's.
        """
        trained = self.trained()
        names_here: dict[int, str] = {}
        for name, tensor, _ in self.state():
            names_here.setdefault(id(tensor), name)
        for each in self.base():
            if names_here.get(id(each.parameter), "") in names and id(each.parameter) not in trained:
                self.record_as_trained(each, "unfrozen", keep=True)


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
    handle = find_adapted(listing, attached=attached)
    if handle is None and (listing.all_layers if attached else listing.layers):
        _refuse_part(listing, verb)
    if handle is None:
        raise LoRAError(
            f"{verb}: {type(listing.model).__name__} was not injected; call inject(model, LoRAConfig(...)) first, or "
            "pass the module that inject was called on."
        )
    return handle


def find_adapted(model: nn.Module | Listing, *, part: bool = False, attached: bool = False) -> AdaptedModel | None:
    """Return the handle of an injected model, or None where it holds no adapted layer or only a part of them.

    Args:
        model: any module, or a wrapper of torch or Lightning around a module; or the listing of a module.
        part: also return the handle of a part of an injected model.
        attached: also return the handle of a model with attached adapters alone, which was not injected.

    Raises:
        LoRAError: the module holds several injected models.

    Example::

        handle = find_adapted(model)
        is_injected = handle is not None
    """
    listing = model if isinstance(model, Listing) else Listing(inside_known_wrappers(model))
    handle = _find(listing, part)
    return handle if handle is None or attached or handle.injection.has_trained_adapter else None


def _find(listing: Listing, part: bool) -> AdaptedModel | None:
    """Return the handle of a listed model, or None where no layer of it is adapted. `part` is find_adapted's.

    In the order of the code below:
    - The model is the injected module.
    - It holds several injections: frozen ones, such as a reference copy's, are passed over; two others are an error.
    - A module inside of it is the injected one: `prefix` is that module's name.
    - It lies inside the injected module: `inside` is its place there. None where it has not all of the layers, unless
      `part` is True.
    - It is a new module around the same layers, or the injected module is gone: it counts as the injected module.
    """
    model = listing.model
    injection = injection_of_root(model)
    if injection is not None:
        return with_lists(AdaptedModel(model, model, injection), listing)
    roots = {name: module for name, module in listing.modules if injection_of_root(module) is not None}
    layers = listing.all_layers
    injections = [vars(root)[INJECTION_ATTRIBUTE] for root in roots.values()] + [
        layer.lora.injection for layer in layers.values()
    ]
    if len(set(injections)) > 1:
        frozen = _frozen_injections(listing.places)
        roots = {name: root for name, root in roots.items() if vars(root)[INJECTION_ATTRIBUTE] not in frozen}
        injections = [injection for injection in injections if injection not in frozen]
    if len(set(injections)) > 1 or (layers and not injections):
        names = ", ".join(map(repr, roots or layers))
        raise LoRAError(f"{type(model).__name__}: holds several injected models ({names}); handle each by itself.")
    if roots:
        name, root = next(iter(roots.items()))
        return with_lists(AdaptedModel(model, root, injections[0], prefix=f"{name}." if name else ""), listing)
    if not layers:
        return None
    injection = injections[0]
    root = injection.holder()
    if root is not None:
        outer = AdaptedModel(root, root, injection)
        if not part and set(outer.all_layers.values()) - set(layers.values()):
            return None
        inside = [name for name, module in outer.places if module is model]
        if inside:
            handle = AdaptedModel(model, root, injection, inside=f"{inside[0]}." if inside[0] else "")
            handle.root_places = outer.places
            return with_lists(handle, listing)
    return with_lists(AdaptedModel(model, model, injection), listing)


def injection_of_root(module: nn.Module) -> Injection | None:
    """Return the injection of which a module is the root, or None.

    An injection that has ended stays in a copy of the injected module where a part of the copy got another adapter: the
    copy of an injection does not know which module holds it.
    """
    injection: Injection | None = vars(module).get(INJECTION_ATTRIBUTE)
    return injection if injection is not None and "ended" not in injection.marks else None


def _frozen_injections(places: NamedModules) -> set[Injection]:
    """Return the injections, of several that modules belong to, whose adapters are all frozen."""
    if len({facts.injection for _, module in places if (facts := facts_of(module)) is not None}) < 2:
        return set()
    layers = adapted_layers(places[0][1], modules=places).values()
    trained = {
        layer.lora.injection for layer in layers if any(tensor.requires_grad for tensor in layer.stored().values())
    }
    return {layer.lora.injection for layer in layers} - trained


def with_lists(handle: AdaptedModel, listing: Listing) -> AdaptedModel:
    """Give a handle the lists that were made to find it, and return it."""
    if not _frozen_injections(listing.places) - {handle.injection}:
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
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        places.append((name, module))
        path = f"{name}." if name else ""
        for segment, child in reversed(module._modules.items()):  # the last to wait is the next
            if child is not None:
                waiting.append((name if segment in WRAPPERS else path + segment, child))
    return places


def _each_once(places: NamedModules) -> NamedModules:
    first: dict[nn.Module, str] = {}
    for name, module in places:
        first.setdefault(module, name)
    return [(name, module) for module, name in first.items()]


def is_inside(name: str, outer: str) -> bool:
    """Return whether a name is the module `outer` or lies inside it."""
    return not outer or name == outer or name.startswith(f"{outer}.")
