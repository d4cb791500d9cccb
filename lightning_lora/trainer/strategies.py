"""Strategies of Lightning that need more than hooks."""

from __future__ import annotations

from typing import Any

from ..errors import LoRAError
from .compatibility import slicing
from .deepspeed import prepare_deepspeed
from .fsdp1 import prepare_fsdp1
from .one_file import share_one_file


def prepare_strategy(strategy: Any, save: str) -> None:
    """Patch how a strategy that divides a model or its optimizer works, and how it saves and loads checkpoints.

    Args:
        strategy: of a Trainer in setup. Others stay as they are.
        save: the kind of the checkpoints.

    Raises:
        LoRAError: the strategy cannot be used, or not with such checkpoints. The message names the alternative.
    """
    names = [cls.__name__ for cls in type(strategy).__mro__]
    dividing = "ModelParallelStrategy" if "ModelParallelStrategy" in names else slicing(strategy)
    if save == "full" and dividing:
        raise LoRAError(
            f"LoRACallback: save='full' is for a base that each rank holds whole, and {dividing} divides it. Use "
            "save='adapter' or save='merged', or strategy='ddp' where the base fits on one device."
        )
    if "FSDPStrategy" in names:
        prepare_fsdp1(strategy)
    elif "DeepSpeedStrategy" in names:
        prepare_deepspeed(strategy)
    if dividing or "DeepSpeedStrategy" in names:
        share_one_file(strategy)
