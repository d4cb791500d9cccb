"""The record of a LightningModule's injection, found without a walk of the model, for the hooks of every batch."""

from __future__ import annotations

from torch import nn

from ..model.adapted_model import find_model
from ..model.injection import Injection
from ..names import ATTRIBUTE, MERGED_FOR_GOOD

INSIDE = "lora_record_inside"  # attribute of a module in a run: the record, where a module inside is the injected one


def record_of(module: nn.Module) -> Injection | None:
    """Return the record of an injected LightningModule, without a walk from the second call on.

    None where nothing is injected, or a fit has merged the module for good.
    """
    if is_merged_for_good(module):
        return None
    record: Injection | None = vars(module).get(ATTRIBUTE) or vars(module).get(INSIDE)
    if record is None or "ended" in record.marks:
        handle = find_model(module)
        record = vars(module)[INSIDE] = handle.record if handle is not None else None
    return record


def forget_record(module: nn.Module) -> None:
    """Remove what record_of keeps in a module. In place."""
    vars(module).pop(INSIDE, None)


def is_merged_for_good(module: nn.Module) -> bool:
    """Return whether a fit merged the model for good, and nothing injected it since."""
    return MERGED_FOR_GOOD in vars(module)
