"""Merged evaluation of one LightningModule: merged at the first batch, unmerged at the end."""

from __future__ import annotations

import time
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..errors import LoRAError, NonFiniteError, sentence
from ..model.adapted_model import Listing, find_model
from ..model.injection import Injection, MergeCost
from ..model.merging import has_rounding_to_tell, holds_merged, is_merged, merge, merge_listed, unmerge, unmerge_listed
from .step_lists import StepLists


class Evaluation:
    """The evaluations of one module.

    Attributes:
        merged: whether the module was merged here, and so is to be unmerged here.
        stays_unmerged: whether merging found a value that is not finite, so that this evaluation runs unmerged.
    """

    def __init__(self) -> None:
        self.merged = False
        self.stays_unmerged = False

    def start_batch(self, trainer: Any, module: Any, lists: StepLists) -> None:
        """Merge if that has not been done yet. In place."""
        if not self.stays_unmerged and not lists.is_merged():
            self._merge(trainer, module, lists.record)

    def _merge(self, trainer: Any, module: nn.Module, record: Injection | None) -> None:
        """Merge. In a fit, a value that is not finite is a warning. In place."""
        self.merged = True  # first, because Ctrl-C is raised when merging is complete
        try:
            _merge_noting_cost(module, record, in_fit=trainer.state.fn == "fit")
        except NonFiniteError as error:
            if trainer.state.fn != "fit":
                raise
            self.stays_unmerged = True  # EarlyStopping and others judge the loss
            rank_zero_warn(f"LoRACallback: this validation runs unmerged: {sentence(error)}")

    def end(self, module: nn.Module) -> None:
        """Unmerge what was merged here. In place."""
        self.stays_unmerged = False
        if self.merged:
            self.merged = False
            if is_merged(module):
                unmerge(module)


def _merge_noting_cost(module: nn.Module, record: Injection | None, *, in_fit: bool) -> None:
    """Merge, and keep in the record of the injection what the merge took, for LoRAMonitor. In place."""
    if record is None:
        merge(module)  # raises
        return
    began, record.rounding = time.perf_counter(), None
    merge_listed(Listing(module), warns_of_untrained=not in_fit, tells_rounding=not in_fit)
    record.last_merge = MergeCost(time.perf_counter() - began, record.rounding)


def tell_rounding(module: nn.Module) -> None:
    """Log what rounding W' to 16 bits costs at the end of a fit that has merged, by one more merge. Collective.

    Earlier merges of the fit say nothing: an adapter that has just begun to grow loses most of itself.
    """
    handle = find_model(module)
    if handle is None or handle.record.last_merge is None or holds_merged(handle.layers.values()):
        return
    if has_rounding_to_tell(handle.layers.values()):
        try:
            merge_listed(handle, warns_of_untrained=False)
        except LoRAError:
            return  # every layer is unmerged; what needs the model merged says why it cannot be
        unmerge_listed(handle)
