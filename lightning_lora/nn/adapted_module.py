"""A module that holds adapters: how its class is swapped, what its state dict holds, what stands in for its weights.

Invariants for every adapted layer and every parameter that is adapted by itself:
    - The module's class is a subclass of its former class. Module tree, names, parameter objects and storage stay.
    - With lora_active False, the base class's own forward runs and nothing else.
    - With lora.undo the weight holds W'. A layer with lora.merged but without lora.undo stays factored.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..distributed.flat import is_gathered, owns_flat, shows_nothing
from ..errors import LoRAError
from ..names import canonical, join_names, names_factor
from .adapted_weights import AdaptedWeights
from .claims import Claim, claimed
from .low_rank import HALF

# Key in the metadata of a state dict, which torch pickles with it: the module's weights in it are merged.
MERGED = "lora_merged"

NamedModules = Sequence[tuple[str, nn.Module]]  # what named_modules() yields

Transform = Callable[[torch.Tensor], torch.Tensor]

_CLASSES: dict[tuple[type, type], type[Swapped]] = {}  # results of swapped_class, by mixin and base class


class Swapped(nn.Module):
    """A module whose class a subclass has replaced, so that isinstance and names stay.

    fully_shard subclasses the swapped class once more. Pickling such a module is left to torch.
    """

    lora_mixin: ClassVar[type[Swapped]]  # the class of this package that the swapped class combines
    lora_base: ClassVar[type[nn.Module]]  # with the module's former class
    # Makes torch's compiler read parameters while it traces, so that it sees when W' stands in for a weight.
    # Without it, torch.export of torch 2.6 would not see that.
    torchdynamo_force_dynamic: ClassVar[bool] = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        swapped = type(self) is swapped_class(self.lora_mixin, self.lora_base)
        if swapped and make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return (_new_swapped, (self.lora_mixin, self.lora_base), *state)
        return (make, args, *state)


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """Return the subclass of a mixin and a base class; each pair has one.

    It has the name of the base class, because programs look layers up by the name of their class.
    """
    if (mixin, base) not in _CLASSES:
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        attributes = {**names, "lora_mixin": mixin, "lora_base": base}
        make, bases = (type, (mixin, base)) if _has_usual_layout(base) else (_base_first(mixin, base), (base, mixin))
        _CLASSES.setdefault((mixin, base), make(base.__name__, bases, attributes))
    return _CLASSES[mixin, base]


def _has_usual_layout(cls: type) -> bool:
    """Return whether Python lets instances get a class whose first base is the mixin.

    Python compares how instances lie in memory, which a class takes from its first base. A first base without
    `__dict__`, such as ABC, Generic or any class with `__slots__ = ()`, gives them another layout than nn.Module's.
    """
    while cast(type, cls.__base__).__dictoffset__:
        cls = cast(type, cls.__base__)
    return cls.__base__ is object


def _base_first(mixin: type, base: type) -> type:
    """Return a metaclass for classes with bases (base, mixin), which looks attributes up in the mixin first."""

    def mro(cls: type) -> list[type]:
        if "lora_base" not in vars(cls):  # a subclass
            return type.mro(cls)
        return [cls, *(parent for parent in mixin.__mro__ if parent not in base.__mro__), *base.__mro__]

    return type(type(base).__name__, (type(base),), {"mro": mro})


class AdaptedModule(Swapped):
    """A module that holds adapted weights: an adapted layer, or a module with some adapted parameters."""

    ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # names of attributes, other than parameters, that the mixin sets

    def lora_adapters(self) -> Mapping[str, AdaptedWeights]:
        """Return the adapters of this module by parameter name; a whole adapted layer has one adapter, named ""."""
        raise NotImplementedError

    def lora_put(self, values: Mapping[str, Any]) -> None:
        """Put values under the names of parameters, or put the parameters back. In place."""
        self._parameters.update(values)
        if not torch.compiler.is_compiling() and owns_flat(self):
            # FSDP1 also sets what it has gathered as plain attributes, which are found first.
            vars(self).update({name: value for name, value in values.items() if name in vars(self)})

    def lora_unadapt(self, adapter: AdaptedWeights) -> None:
        """Restore the module's class and attributes from before it was adapted. In place."""
        own_attributes = self.ATTRIBUTES  # before the class, which has them
        swapped, before = swapped_class(self.lora_mixin, self.lora_base), self.lora_base
        if type(self) is not swapped:
            # fully_shard has subclassed the swapped class since. Its class stays, made anew without the mixin.
            here = type(self)
            bases = tuple(before if parent is swapped else parent for parent in here.__bases__)
            attributes = {name: each for name, each in vars(here).items() if name not in ("__dict__", "__weakref__")}
            before = type(here.__name__, bases, attributes)
        self.__class__ = before  # type: ignore[assignment]
        for name in own_attributes:
            vars(self).pop(name, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with self._lora_locked():
            for adapter in self.lora_adapters().values():
                if adapter.lora.stands_in:
                    raise LoRAError(
                        f"{adapter.lora.name!r}: a copy or a pickle is made inside a forward of this layer, while W' "
                        "stands in for its weight; make it outside of the forward."
                    )
            make, args, state, *rest = super().__reduce_ex__(protocol)
            # The copy or pickle reads what holds weights after this, when another thread may have put W' in.
            found = {name: copy.copy(state[name]) for name in ("_parameters", "_flat_weights") if name in state}
            return (make, args, {**state, **found}, *rest)

    def extra_repr(self) -> str:
        """Return the base class's text, followed by r and alpha of each adapter."""
        adapters = self.lora_adapters().items()
        options = (f"{name}{': ' if name else ''}{adapter.options_text()}" for name, adapter in adapters)
        return ", ".join(filter(None, [super().extra_repr(), *options]))

    def _apply(self, fn: Transform, recurse: bool = True) -> Any:
        adapters = list(self.lora_adapters().values())
        were_meta = [adapter for adapter in adapters if _is_meta(adapter)]
        before = dict(self._parameters)
        with self._lora_briefly_unmerged("cast or move"):
            super()._apply(_keeping_float32(fn, adapters), recurse)  # type: ignore[no-untyped-call]
            for adapter in adapters:
                adapter.tie_again_(self, before, loaded=False)
                if adapter.lora.attached is not None:
                    adapter.lora.attached.move_(fn)
        for adapter in were_meta:
            if not _is_meta(adapter):  # to_empty gave it memory without values
                adapter.draw_()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        adapters = self.lora_adapters().values()
        with self._lora_locked():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for adapter in adapters:
                if adapter.lora.undo is not None or adapter.lora.restore_failed:
                    weight = adapter.adapted_weight()
                    if is_gathered(weight):
                        raise LoRAError(
                            f"state_dict: {adapter.lora.name!r} is merged, and {adapter.weight_leaf!r} is gathered "
                            "from all ranks, so its values are merged ones. Call unmerge(model) first, or save a "
                            "checkpoint with the Trainer."
                        )
                    if not shows_nothing(weight):  # else a flat weight, which stays as the strategy shows it: empty
                        destination[prefix + adapter.weight_leaf] = adapter.original()
                if adapter.lora.attached is not None:
                    adapter.lora.attached.mark_as_lacking(destination, prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Load a state dict, in which a merged weight's entry is W. An adapter without an entry keeps its tensors.

        Untrained tensors that started from the old weight start again from the new one.

        Raises:
            LoRAError: the state dict says that its weights are merged, and the adapter would be added to them again.
        """
        adapters = self.lora_adapters().values()
        if metadata.get(MERGED):
            refuse_merged_weights(prefix.rstrip(".") or type(self).__name__, adapters)
        with self._lora_briefly_unmerged():
            for adapter in adapters:
                own = {adapter.stored_name(leaf): tensor for leaf, tensor in adapter.stored().items()}
                entries = {prefix + name: tensor for name, tensor in own.items() if name in self._parameters}
                if state_dict.keys().isdisjoint(entries):
                    state_dict.update(entries)
            # Before the load: it compares the factors with what the old weight gives.
            again = [adapter for adapter in adapters if adapter.starts_again(state_dict, prefix)]
            before = dict(self._parameters)
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)
            for adapter in adapters:
                adapter.tie_again_(self, before, loaded=True)
                if adapter in again:
                    adapter.draw_()
                # torch loads no value of another shape, and names it in its error when the base is lost still.
                given = state_dict.get(prefix + adapter.weight_leaf)
                is_loaded = getattr(given, "shape", None) == adapter.weight_shape()
                adapter.lora.restore_failed = adapter.lora.restore_failed and not is_loaded

    @contextmanager
    def _lora_locked(self) -> Iterator[None]:
        """Hold the adapters' locks inside the block. It waits while W' stands in for W in another thread."""
        with ExitStack() as stack:
            for adapter in self.lora_adapters().values():
                stack.enter_context(adapter.lora.lock)
            yield

    @contextmanager
    def _lora_briefly_unmerged(self, verb: str = "load_state_dict") -> Iterator[None]:
        adapters = self.lora_adapters().values()
        with ExitStack() as stack:
            stack.enter_context(claimed_with(adapters, verb))
            for adapter in adapters:
                stack.enter_context(adapter.briefly_unmerged())
            yield

    def __prepare_scriptable__(self) -> Any:
        """Refuse TorchScript, which calls this method first; it would fail later with an error about annotations."""
        name = next(iter(self.lora_adapters().values())).lora.name
        raise LoRAError(
            f"torch.jit.script: {name!r} is an adapted {self.lora_base.__name__}, which TorchScript cannot "
            "compile. Call merge_and_unload(model) first, on a copy (copy.deepcopy) if the adapter is still needed; "
            "or trace the model (torch.jit.trace, to_torchscript(method='trace'))."
        )


class StandIns:
    """Context manager: inside, W' stands in for each adapted weight of a module.

    It is a class because torch 2.6 cannot trace a context manager made from a generator.

    Args:
        module: the module whose weights are replaced.
        adapters: its adapters that take part.
    """

    def __init__(self, module: AdaptedModule, adapters: Sequence[AdaptedWeights]) -> None:
        self.module, self.adapters = module, adapters
        # The compiler traces one thread, so there is nothing to lock.
        self.states = [] if torch.compiler.is_compiling() else [each.lora for each in adapters]

    def __enter__(self) -> None:
        for state in self.states:
            state.lock.acquire()
        try:
            # Another thread may have merged them while this one waited for the lock.
            adapters = [each for each in self.adapters if each.lora_active] if self.states else self.adapters
            self.weights = {each.weight_leaf: getattr(self.module, each.weight_leaf) for each in adapters}
            values = {each.weight_leaf: each.stand_in(self.weights[each.weight_leaf]) for each in adapters}
        except BaseException:
            for state in self.states:
                state.lock.release()
            raise
        for state in self.states:
            state.stands_in += 1
        try:
            self.module.lora_put(values)
        except BaseException:  # those that were put in are put back, and nothing stays locked
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            self.module.lora_put(self.weights)
        finally:
            for state in self.states:
                state.stands_in -= 1
                state.lock.release()


def refuse_merged_weights(name: str, adapters: Iterable[AdaptedWeights]) -> None:
    """Raise LoRAError where merged weights are loaded under adapters, which would be added to them again.

    Args:
        name: of what they are loaded into, for the message.
        adapters: that are in it.
    """
    if any(adapter.changes_weight() for adapter in adapters):
        raise LoRAError(
            'load_state_dict: the state dict holds merged weights, as save="merged" and merged_state_dict write them, '
            f"and {name!r} has an adapter, which would be added to them a second time. Load the checkpoint with "
            "load_adapter(model, path), or its weights into a model without an adapter. Where a library loads the "
            'best checkpoint when fit ends, pass merge_after_fit=True with save="merged", or save="full".'
        )


def claimed_with(adapters: Iterable[AdaptedWeights], verb: str) -> AbstractContextManager[Claim]:
    """Claim the models that hold these adapters inside the block; see claims.claimed."""
    return claimed(verb, *[injection.claims for injection in injections_of(adapters)])


def injections_of(adapters: Iterable[AdaptedWeights]) -> list[Any]:
    """Return the injections that adapters belong to, each once."""
    return list(dict.fromkeys(each.lora.injection for each in adapters))


def adapted_places(
    model: nn.Module, *, remove_duplicate: bool = True, modules: NamedModules | None = None
) -> Iterator[tuple[str, nn.Module, AdaptedWeights]]:
    """Yield (name, module, adapter) for each adapter of a model. An adapter of several modules comes once for each.

    Args:
        model: the model.
        remove_duplicate: as in named_modules.
        modules: the result of the model's named_modules, if the caller has it.
    """
    for path, module in model.named_modules(remove_duplicate=remove_duplicate) if modules is None else modules:
        if isinstance(module, AdaptedModule):
            for parameter, adapter in module.lora_adapters().items():
                yield join_names(canonical(path), parameter), module, adapter


def adapted_layers(
    model: nn.Module, *, remove_duplicate: bool = True, modules: NamedModules | None = None
) -> dict[str, AdaptedWeights]:
    """Return the adapters of a model's layers and parameters, by name.

    Args:
        model: the model.
        remove_duplicate: whether a shared adapter is returned under its first name only, or under each of its names.
        modules: the result of the model's named_modules, if the caller has it.
    """
    first: dict[AdaptedWeights, str] = {}
    places = adapted_places(model, remove_duplicate=remove_duplicate, modules=modules)
    return {name: each for name, _, each in places if first.setdefault(each, name) == name or not remove_duplicate}


def adapters_in(module: object) -> Mapping[str, AdaptedWeights]:
    """Return a module's own adapters by parameter name; a whole adapted layer has one adapter, named ""."""
    return module.lora_adapters() if isinstance(module, AdaptedModule) else {}


def adapters_by_path(places: NamedModules) -> list[tuple[str, AdaptedWeights]]:
    """Return each adapter with the beginning of its tensors' names; a shared adapter under each path.

    Args:
        places: every module of a model, under each of its names.
    """
    modules = [(f"{name}." if name else "", module) for name, module in places]
    return [(path, adapter) for path, module in modules for adapter in adapters_in(module).values()]


def layer_adapter(module: object) -> AdaptedWeights | None:
    """Return the adapter of a module that is adapted as a whole layer, or None."""
    return adapters_in(module).get("")


def adapter_of(module: nn.Module, weight: str) -> AdaptedWeights | None:
    """Return the adapter that changes one of a module's own parameters, or None."""
    return next((each for each in adapters_in(module).values() if weight == each.weight_leaf), None)


def unadapt_(adapter: AdaptedWeights) -> None:
    """Remove an adapter's stored tensors and restore its holders' classes and attributes; weights stay. In place."""
    adapter.unload_trained()
    for holder in adapter.lora_holders():
        if isinstance(holder, AdaptedModule):
            holder.lora_unadapt(adapter)


def is_factor(name: str, module: nn.Module) -> bool:
    """Return whether a name in a module's state belongs to a stored tensor of an adapter."""
    return isinstance(module, AdaptedModule) and names_factor(name)


def _is_meta(adapter: AdaptedWeights) -> bool:
    return any(tensor.is_meta for tensor in adapter.stored().values())


def _keeping_float32(fn: Transform, adapters: Iterable[AdaptedWeights]) -> Transform:
    """Return fn, changed so that it keeps the dtype of stored tensors where fn would cast them to 16 bits.

    The tensors train in float32 and are cast to the layer's dtype in each forward.
    """
    kept = [adapter for adapter in adapters if adapter.lora.spec.keep_float32]
    factors = {id(t) for each in kept for p in each.stored().values() for t in (p, p.grad) if t is not None}

    def without_narrowing(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        narrows = moved.dtype in HALF and tensor.dtype not in HALF
        return tensor.to(moved.device) if narrows and id(tensor) in factors else moved

    return without_narrowing if kept else fn


def _new_swapped(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    swapped = swapped_class(mixin, base)
    return swapped.__new__(swapped)
