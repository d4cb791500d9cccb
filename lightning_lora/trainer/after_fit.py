"""Merge a model for good when its fit has ended, so that libraries that save the model save merged weights."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import refuse_fully_sharded
from ..errors import LoRAError
from ..formats.lightning_checkpoint import adapter_in_checkpoint
from ..model.adapted_model import AdaptedModel, find_adapted, open_model
from ..model.dequantize import dequantize_dtype
from ..model.inject import merge_and_unload
from ..model.patches import call_previous, patch
from ..model.state_dict import refuse_unmergeable
from ..names import MERGED_FOR_GOOD, META
from ..private.lightning import starts_processes
from .run_state import run_of


def refuse_merge_after_fit(trainer: Any, handle: AdaptedModel) -> None:
    """Raise LoRAError, with the remedy, where a model could not be merged for good after its fit."""
    if starts_processes(trainer):
        raise LoRAError(
            f"LoRACallback: merge_after_fit cannot be used with {type(trainer.strategy).__name__}, which fits in other "
            "processes and brings back weights only. Call merge_and_unload(model) after fit, or use strategy='ddp'."
        )
    modules = (module for _, module in handle.modules)
    refuse_fully_sharded(handle.model, modules, "LoRACallback(merge_after_fit=True)")
    refuse_unmergeable(handle, _dtype(handle))


def merge_for_good(module: nn.Module) -> None:
    """Replace adapted layers by plain ones with merged weights. Mark the model, so that evaluation leaves it alone."""
    merge_and_unload(module, dequantize=_dtype(open_model(module, "LoRACallback")))
    setattr(module, MERGED_FOR_GOOD, True)


def _dtype(handle: AdaptedModel) -> torch.dtype | None:
    """Return the dtype of the plain weights that replace quantized ones, or None."""
    return dequantize_dtype(run_of(handle.injection).dequantize, "LoRACallback")


def forget_merging(module: nn.Module) -> None:
    """Remove the mark of merge_for_good: the model is about to get adapters again."""
    vars(module).pop(MERGED_FOR_GOOD, None)


def load_plain_weights_only(module: nn.Module) -> None:
    """Patch a model that was merged for good so that it refuses checkpoints that need its base."""
    patch(module, "on_load_checkpoint", _on_load_checkpoint)


def _on_load_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    if META in checkpoint and find_adapted(module) is None:
        kind = adapter_in_checkpoint(checkpoint)[1]
        if kind != "merged":
            raise LoRAError(
                f"LoRACallback: the checkpoint of kind {kind!r} holds an adapter for the base, but merge_after_fit has "
                f"merged that of this {type(module).__name__} for good. Load it into a new one, as with "
                "load_from_checkpoint(cls, path), or let checkpoints hold merged weights: save='merged'."
            )
    call_previous(module, previous, "on_load_checkpoint", checkpoint)
