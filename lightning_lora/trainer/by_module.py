"""What a callback keeps of each LightningModule: a hook may run a second Trainer with the same callback."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

State = TypeVar("State")


class ByModule(WeakKeyDictionary[nn.Module, State]):
    """One object for each module, kept as long as the module lives.

    A copy, pickled or deep, is empty: a copy of the callback will be called with other modules.
    """

    def __reduce__(self) -> Any:
        return type(self), ()

    def __deepcopy__(self, memo: Any) -> ByModule[State]:
        return type(self)()
