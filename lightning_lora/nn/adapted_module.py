"""A module that holds adapters: how its class is swapped, what its state dict holds, what stands in for its weights.

Invariants, for every adapted layer, and every parameter that is adapted by itself:
    - its module's class is a subclass of the class it had; module tree, names, parameter objects and storage stay;
    - lora_active False means: run the base class's own forward and nothing else;
    - a weight named in lora.records holds W'; lora.merged without records means that the layer stays factored.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import nn

from ..errors import LoRAError
from ..names import names_factor
from .low_rank import HALF
from .writer import Turn

Transform = Callable[[torch.Tensor], torch.Tensor]

_CLASSES: dict[tuple[type, type], type[Swapped]] = {}  # that swapped_class made


class Adapter(Protocol):
    """What a module asks an adapter that it holds; nn/adapted_weights.py has the class."""

    lora_active: bool
    lora: Any  # its LayerState

    def options_text(self) -> str:
        """Return what repr says of the adapter."""

    def stored(self) -> dict[str, nn.Parameter]:
        """Return the adapter's tensors by leaf name."""

    def stored_name(self, leaf: str) -> str:
        """Return the name of one of them in the module."""

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the adapter changes, by name."""

    def stand_ins(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Return what stands in for each of adapted_weights in a forward that reads them."""

    def original(self, name: str) -> torch.Tensor:
        """Return a parameter as it is without the adapter, detached."""

    def briefly_unmerged(self) -> AbstractContextManager[None]:
        """Unmerge inside, so that what changes a weight there changes W."""

    def followers(self, state_dict: Mapping[str, Any], prefix: str) -> Collection[str]:
        """Return the leaf names of tensors that follow the new weight that a state dict brings."""

    def draw_(self, leaves: Collection[str] | None = None) -> None:
        """Let tensors have their initial values."""

    def tie_again_(self, module: nn.Module, before: Mapping[str, nn.Parameter | None], *, loaded: bool) -> None:
        """Tie again what other modules shared with this one, where torch made a parameter for each."""

    def weight_changed(self) -> None:
        """Forget what was computed from the weight."""

    def place(self) -> Any:
        """Return the layer as its variant sees it."""


class Swapped(nn.Module):
    """A module whose class was replaced by a subclass of it.

    fully_shard in turn subclasses the class that it finds; such a module is rebuilt, or not, as torch decides.
    """

    lora_mixin: ClassVar[type[Swapped]]  # the two classes that the subclass combines
    lora_base: ClassVar[type[nn.Module]]
    # torch's compiler looks whether a weight is stood in for while it traces; torch.export of torch 2.6 would not.
    torchdynamo_force_dynamic: ClassVar[bool] = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        swapped = type(self) is swapped_class(self.lora_mixin, self.lora_base)
        if swapped and make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return (_new_swapped, (self.lora_mixin, self.lora_base), *state)
        return (make, args, *state)


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """Return the one subclass of a pair of mixin and base class, called as the base: programs go by a class's name."""
    if (mixin, base) not in _CLASSES:
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        attributes = {**names, "lora_mixin": mixin, "lora_base": base}
        _CLASSES.setdefault((mixin, base), type(base.__name__, (mixin, base), attributes))
    return _CLASSES[mixin, base]


class AdaptedModule(Swapped):
    """A module that holds adapted weights: an adapted layer, or one of whose parameters some are adapted."""

    ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what the mixin sets on the module, beside parameters

    def lora_adapters(self) -> Mapping[str, Adapter]:
        """Return what is adapted here, by the parameter's name, or under "" where the whole layer is."""
        raise NotImplementedError

    def lora_place(self, values: Mapping[str, Any]) -> None:
        """Let values stand in for parameters, or put these back."""
        self._parameters.update(values)

    def lora_take_out(self, adapter: Adapter) -> None:
        """Give the module back the class and the attributes that it had without this adapter. In place."""
        attributes = self.ATTRIBUTES
        self.__class__ = class_before_swap(self)  # type: ignore[assignment]
        for name in attributes:
            vars(self).pop(name, None)

    def extra_repr(self) -> str:
        """Return what the module shows of itself, and r and alpha of what is adapted."""
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
                adapter.weight_changed()
        for adapter in were_meta:
            if not _is_meta(adapter):  # to_empty
                _refuse_new_values(adapter)
                adapter.draw_()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        adapters = self.lora_adapters().values()
        with ExitStack() as stack:
            for adapter in adapters:
                stack.enter_context(adapter.lora.lock)  # W, and not what stands in for it in another thread's forward
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for adapter in adapters:
                if adapter.lora.records or adapter.lora.restore_failed:
                    destination.update({prefix + name: adapter.original(name) for name in adapter.adapted_weights()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load; tensors that started from the weight, are not trained and not loaded start from the new one."""
        adapters = self.lora_adapters().values()
        with self._lora_briefly_unmerged():
            following = [(adapter, adapter.followers(state_dict, prefix)) for adapter in adapters]
            before = dict(self._parameters)
            super()._load_from_state_dict(state_dict, prefix, *args)
            for adapter, leaves in following:
                adapter.tie_again_(self, before, loaded=True)
                adapter.weight_changed()
                if leaves:
                    adapter.draw_(leaves)
                absent = any(prefix + name not in state_dict for name in adapter.adapted_weights())
                adapter.lora.restore_failed = adapter.lora.restore_failed and absent

    @contextmanager
    def _lora_briefly_unmerged(self, verb: str = "load_state_dict") -> Iterator[None]:
        adapters = self.lora_adapters().values()
        with ExitStack() as stack:
            stack.enter_context(take_turn(adapters, verb))
            for adapter in adapters:
                stack.enter_context(adapter.briefly_unmerged())
            yield

    def __prepare_scriptable__(self) -> Any:
        """Refuse TorchScript, which calls this first, and would end in an error of its own about annotations."""
        name = next(iter(self.lora_adapters().values())).lora.name
        raise LoRAError(
            f"torch.jit.script: {name!r} is an adapted {self.lora_base.__name__}, which TorchScript cannot "
            "compile. Call merge_and_unload(model) first, on a copy (copy.deepcopy) if the adapter is still needed; "
            "or trace the model (torch.jit.trace, to_torchscript(method='trace'))."
        )


class StandIns:
    """Let W + delta stand in for adapted weights inside; a class, as torch 2.6 cannot trace a generator's context."""

    def __init__(self, module: AdaptedModule, adapters: Sequence[Adapter]) -> None:
        self.module, self.adapters = module, adapters
        self.states = [] if torch.compiler.is_compiling() else [each.lora for each in adapters]  # it traces one thread

    def __enter__(self) -> None:
        for state in self.states:
            state.lock.acquire()
        try:
            # Another thread may have merged them meanwhile.
            adapters = [each for each in self.adapters if each.lora_active] if self.states else self.adapters
            names = [name for adapter in adapters for name in adapter.adapted_weights()]
            self.weights = {name: getattr(self.module, name) for name in names}
            values: dict[str, Any] = {}
            for adapter in adapters:
                values.update(adapter.stand_ins(self.weights))
        except BaseException:
            for state in self.states:
                state.lock.release()
            raise
        for state in self.states:
            state.stands_in += 1
        self.module.lora_place(values)

    def __exit__(self, *exception: object) -> None:
        self.module.lora_place(self.weights)
        for state in self.states:
            state.stands_in -= 1
            state.lock.release()


def take_turn(adapters: Iterable[Adapter], verb: str) -> Turn:
    """Return the turn, for a `with` block, at changing the models that adapters are in."""
    records = {id(record): record for record in [each.lora.injection for each in adapters]}
    return Turn(verb, [record.writer for record in records.values()])


def is_factor(name: str, module: nn.Module) -> bool:
    """Return whether a state name of a module is that of a factor."""
    return isinstance(module, AdaptedModule) and names_factor(name)


def class_before_swap(module: Swapped) -> type[nn.Module]:
    """Return the class that a module had, or one like its own without the mixin, where fully_shard made that."""
    swapped, base = swapped_class(module.lora_mixin, module.lora_base), module.lora_base
    if type(module) is swapped:
        return base
    bases = tuple(base if parent is swapped else parent for parent in type(module).__bases__)
    attributes = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(type(module).__name__, bases, attributes)


def _is_meta(adapter: Adapter) -> bool:
    return next(iter(adapter.stored().values())).is_meta


def _refuse_new_values(adapter: Adapter) -> None:
    """Raise LoRAError where the adapter was computed from the weight, which has no values after to_empty."""
    if adapter.lora.spec.variant.needs_values(adapter.place()):
        raise LoRAError(
            f"{adapter.lora.name!r}: its adapter starts from the weight, which has no values after to_empty; inject "
            "after the weights are loaded."
        )


def _keeping_float32(fn: Transform, adapters: Iterable[Adapter]) -> Transform:
    """fn, but for casting the factors to 16 bits: they train in float32 while they compute in the layer's dtype."""
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
