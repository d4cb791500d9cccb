"""Merged evaluation of one LightningModule: merged at the first batch, unmerged at the end."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..errors import NonFiniteError, sentence
from ..model.adapted_model import Listing
from ..model.merging import is_merged, merge_listed, unmerge
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
            self._merge(trainer, module)

    def _merge(self, trainer: Any, module: nn.Module) -> None:
        """Merge. In a fit, a value that is not finite is a warning. In place."""
        self.merged = True  # first, because Ctrl-C is raised when merging is complete
        try:
            merge_listed(Listing(module), warns_of_untrained=trainer.state.fn != "fit")
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
