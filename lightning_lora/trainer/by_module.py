"""One object for each LightningModule: a hook of one fit may run a second Trainer with the same callback."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

State = TypeVar("State")


class ByModule(WeakKeyDictionary[nn.Module, State]):
    """What a callback keeps of each module that it meets, as long as the module lives.

    A copy of the callback, pickled or not, begins with nothing: it will meet other modules.
    """

    def __reduce__(self) -> Any:
        return type(self), ()

    def __deepcopy__(self, memo: Any) -> ByModule[State]:
        return type(self)()
