"""Merged evaluation of a LightningModule: merged at the first batch, unmerged at the end."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..distributed.sharding import is_spread
from ..errors import NonFiniteError, sentence
from ..model.adapted_model import Listing, find_adapted
from ..model.merging import merge_listed, unmerge
from .run_state import injection_of, run_of


def merge_to_evaluate(trainer: Any, module: nn.Module) -> None:
    """Merge, if that has not been done yet. In a fit, a value that is not finite is a warning. In place."""
    injection = injection_of(module)
    if (
        injection is None
        or not injection.layers
        or injection.marks & {"merged", "factored"}
        or run_of(injection).stays_unmerged
    ):
        return
    injection.merged_to_evaluate = True  # first, because Ctrl-C is raised when merging is complete
    in_fit = trainer.state.fn == "fit"
    try:
        merge_listed(Listing(module), warns=not in_fit)
    except NonFiniteError as error:
        if not in_fit:
            raise
        run_of(injection).stays_unmerged = True  # EarlyStopping and others judge the loss
        rank_zero_warn(f"LoRACallback: this validation runs unmerged: {sentence(error)}")


def warn_of_untrained_adapter(trainer: Any, module: nn.Module) -> None:
    """Warn where a run that is no fit evaluates an adapter that nothing has trained or loaded, which is the base.

    A sharded adapter is not looked at: this rank's part of it may be empty.
    """
    handle = find_adapted(module)
    if handle is None or trainer.state.fn == "fit" or trainer.ckpt_path or "trained" in handle.injection.marks:
        return
    layers = handle.layers.values()
    if layers and not any(is_spread(layer.trained_tensors()[-1]) or not layer.is_initial() for layer in layers):
        rank_zero_warn(
            f"LoRACallback: {trainer.state.fn.value} runs with an adapter that was neither trained nor loaded, and so "
            'computes what the base does. For a trained one pass ckpt_path="adapter.ckpt", or call '
            "load_adapter(model, path) first."
        )


def end_evaluation(module: nn.Module) -> None:
    """Unmerge what merge_to_evaluate has merged. In place."""
    injection = injection_of(module)
    if injection is None:
        return
    run_of(injection).stays_unmerged = False
    if injection.merged_to_evaluate:
        injection.merged_to_evaluate = False
        if "merged" in injection.marks:
            unmerge(module)
