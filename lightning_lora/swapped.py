"""The class swap: a module becomes an instance of a subclass made for it, which pickle and deepcopy can rebuild."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar, cast

from torch import nn


class Swapped(nn.Module):
    """A module whose class was replaced.

    fully_shard in turn subclasses the class that it finds; such a module is rebuilt, or not, as torch decides.

    Attributes:
        lora_mixin, lora_base: the two classes that the subclass combines.
    """

    lora_mixin: ClassVar[type[Swapped]]
    lora_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        ours = type(self) is swapped_class(self.lora_mixin, self.lora_base)
        if ours and make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return (_new_swapped, (self.lora_mixin, self.lora_base), *rest)
        return (make, args, *rest)


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """The one subclass of a pair of mixin and base class."""
    return _CLASSES.get((mixin, base)) or _CLASSES.setdefault((mixin, base), _make_class(mixin, base))


def base_class(module: Swapped) -> type[nn.Module]:
    """The class that a module would have without the swap."""
    ours = swapped_class(module.lora_mixin, module.lora_base)
    if type(module) is ours:
        return module.lora_base
    bases = tuple(module.lora_base if base is ours else base for base in type(module).__bases__)
    own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(type(module).__name__.replace(ours.__name__, module.lora_base.__name__), bases, own)


_CLASSES: dict[tuple[type, type], type[Swapped]] = {}


def _make_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    own = {"__module__": base.__module__, "__doc__": base.__doc__, "lora_mixin": mixin, "lora_base": base}
    return type(f"LoRA{base.__name__}", (mixin, base), own)


def _new_swapped(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    swapped = swapped_class(mixin, base)
    return swapped.__new__(swapped)
