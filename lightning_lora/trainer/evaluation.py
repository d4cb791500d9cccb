"""Merged evaluation of a LightningModule: merged at the first batch, unmerged at the end."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..errors import NonFiniteError, sentence
from ..model.adapted_model import Listing
from ..model.merging import merge_listed, unmerge
from .record import record_of


def merge_to_evaluate(trainer: Any, module: nn.Module) -> None:
    """Merge, if that has not been done yet. In a fit, a value that is not finite is a warning. In place."""
    record = record_of(module)
    if record is None or not record.layers or record.marks & {"merged", "factored"} or record.run.stays_unmerged:
        return
    record.run.merged_here = True  # first, because Ctrl-C is raised when merging is complete
    in_fit = trainer.state.fn == "fit"
    try:
        merge_listed(Listing(module), warns=not in_fit)
    except NonFiniteError as error:
        if not in_fit:
            raise
        record.run.stays_unmerged = True  # EarlyStopping and others judge the loss
        rank_zero_warn(f"LoRACallback: this validation runs unmerged: {sentence(error)}")


def end_evaluation(module: nn.Module) -> None:
    """Unmerge what merge_to_evaluate has merged. In place."""
    record = record_of(module)
    if record is None:
        return
    record.run.stays_unmerged = False
    if record.run.merged_here:
        record.run.merged_here = False
        if "merged" in record.marks:
            unmerge(module)
