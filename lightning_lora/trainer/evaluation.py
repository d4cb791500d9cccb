"""Merged evaluation of a LightningModule: merged at the first batch, unmerged at the end."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..errors import LoRAError, NonFiniteError, sentence
from ..model.adapted_model import Listing, find_model
from ..model.dequantize import dequantize_dtype, tell_dequantised
from ..model.merging import has_rounding_to_tell, holds_merged, merge_listed, unmerge, unmerge_listed
from .record import record_of


def merge_to_evaluate(trainer: Any, module: nn.Module) -> None:
    """Merge, if that has not been done yet. In a fit, a value that is not finite is a warning. In place."""
    record = record_of(module)
    if record is None or not record.layers or record.marks & {"merged", "factored"} or record.run.stays_unmerged:
        return
    record.run.merged_here = True  # first, because Ctrl-C is raised when merging is complete
    in_fit = trainer.state.fn == "fit"
    try:
        merge_listed(Listing(module), warns_of_untrained=not in_fit, tells_rounding=not in_fit)
        record.run.merged_in_fit = in_fit
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


def tell_rounding(module: nn.Module) -> None:
    """Log what rounding W' to 16 bits costs at the end of a fit, by one more merge. Collective.

    It is told of a fit that has merged, and of merged checkpoints of a quantised base. Earlier merges and checkpoints
    say nothing: an adapter that has just begun to grow loses most of itself.
    """
    handle = find_model(module)
    if handle is None or holds_merged(handle.layers.values()):
        return
    run = handle.record.run
    dtype = dequantize_dtype(run.dequantize, "LoRACallback") if run.save == "merged" else None
    try:
        if dtype is not None:
            tell_dequantised(handle.places, dtype)
        if not run.merged_in_fit or not has_rounding_to_tell(handle.layers.values()):
            return
        merge_listed(handle, warns_of_untrained=False)
    except LoRAError:
        return  # every layer is unmerged; what needs the model merged says why it cannot be
    unmerge_listed(handle)
