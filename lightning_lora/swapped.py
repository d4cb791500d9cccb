"""The class swap: a module becomes an instance of a subclass made for it, which pickle and deepcopy can rebuild."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar, cast

from torch import nn


class Swapped(nn.Module):
    """A module whose class was replaced by a subclass made for it; pickle and deepcopy rebuild that subclass.

    Attributes:
        lora_mixin, lora_base: the two classes that the subclass combines.
    """

    lora_mixin: ClassVar[type[Swapped]]
    lora_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return (_new_swapped, (self.lora_mixin, self.lora_base), *rest)
        return (make, args, *rest)


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """The one subclass of a pair of mixin and base class."""
    return _CLASSES.get((mixin, base)) or _CLASSES.setdefault((mixin, base), _make_class(mixin, base))


_CLASSES: dict[tuple[type, type], type[Swapped]] = {}


def _make_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    own = {"__module__": base.__module__, "__doc__": base.__doc__, "lora_mixin": mixin, "lora_base": base}
    return type(f"LoRA{base.__name__}", (mixin, base), own)


def _new_swapped(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    swapped = swapped_class(mixin, base)
    return swapped.__new__(swapped)
