"""Keepers of copies: an optimizer may train copies of parameters, and write these over the parameters in each step.

So whoever writes parameters in the middle of a fit tells it here, and the copies follow. No strategy is known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

Written = Sequence[tuple[torch.Tensor, torch.Tensor]]  # parameters, and the values that they were given


class Keeper(Protocol):
    """Something that keeps copies of parameters."""

    def follow_(self, written: Written) -> None:
        """Give the copies of these parameters the same values. In place. Others are passed over."""


class _Known:
    """The keepers that are alive."""

    keepers: ClassVar[weakref.WeakSet[Keeper]] = weakref.WeakSet()


def add_keeper(keeper: Keeper) -> None:
    """Let a keeper's copies follow the parameters from now on, as long as the keeper lives."""
    _Known.keepers.add(keeper)


def tell_written(written: Written) -> None:
    """Let the copies of parameters follow them. In place.

    Raises:
        LoRAError: a keeper cannot take such values.
    """
    for keeper in list(_Known.keepers):
        keeper.follow_(written)
