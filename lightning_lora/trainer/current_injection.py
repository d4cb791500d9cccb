"""The injection of a LightningModule, found without a walk of the model, for the hooks of every batch."""

from __future__ import annotations

from torch import nn

from ..model.adapted_model import find_model
from ..model.injection import Injection
from ..names import ATTRIBUTE, MERGED_FOR_GOOD

INSIDE = "lora_injection_inside"  # attribute of a module in a run: the injection of a module inside


def injection_of(module: nn.Module) -> Injection | None:
    """Return the injection of an injected LightningModule, without a walk from the second call on.

    None where nothing is injected, or a fit has merged the module for good.
    """
    if is_merged_for_good(module):
        return None
    injection: Injection | None = vars(module).get(ATTRIBUTE) or vars(module).get(INSIDE)
    if injection is None or "ended" in injection.marks:
        handle = find_model(module)
        injection = vars(module)[INSIDE] = handle.injection if handle is not None else None
    return injection


def forget_injection(module: nn.Module) -> None:
    """Remove what injection_of keeps in a module. In place."""
    vars(module).pop(INSIDE, None)


def is_merged_for_good(module: nn.Module) -> bool:
    """Return whether a fit merged the model for good, and nothing injected it since."""
    return MERGED_FOR_GOOD in vars(module)
