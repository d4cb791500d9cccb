"""LoRACallback: calls the functions of this package at the right moments of a Trainer's life."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from .base import A, B
from .checkpoint import Kind, save_as
from .config import ALL_LINEAR, Bias, Init, LoRAConfig
from .errors import LoRAError
from .inject import adapt_new_layers, begin_injection, finish_injection
from .injection import call_previous, find_injection, note_initial, note_trainable, patch, require_injection
from .merge import adapted_layers, is_merged, merge, unmerge
from .state import fingerprint, refuse_unmergeable

log = logging.getLogger(__name__)


class LoRACallback(pl.Callback):
    """Low-rank adapters for any LightningModule: injected on setup, merged while evaluating, saved small.

    The options after `save` are LoRAConfig's. With none of them given, a model that the user injected is adopted as it
    is.

    Args:
        merged_eval: merge for validation, test and prediction, and unmerge after.
        save: what a checkpoint holds: "adapter" (what training changes), "merged" (plain weights for programs without
            this package, and the adapter beside them) or "full" (base and adapter).
        r: rank of A (r, in) and B (out, r).
        lora_alpha: numerator of the scaling s = lora_alpha / r.
        lora_dropout: probability of dropping an input feature of the adapter while the layer is in training mode.
        target_modules: the layers to adapt: a list of names or dotted suffixes, a regular expression, or "all-linear".
        exclude_modules: layers to leave alone although target_modules selects them.
        modules_to_save: modules that are trained and saved whole, beside the adapter.
        rank_pattern: another r for some layers; keys are regular expressions over a dotted suffix of the name.
        alpha_pattern: another lora_alpha for some layers, keys as in rank_pattern.
        bias: which biases are trained: "none", "all", or those of adapted layers ("lora_only").
        use_rslora: s = lora_alpha / sqrt(r).
        init_lora_weights: true, false, "gaussian" or "orthogonal"; see LoRAConfig.
        enable_lora: for a fused projection, which of its equal parts are adapted.
        autocast_adapter_dtype: keep adapters of float16 and bfloat16 layers in float32.

    Raises:
        LoRAError: a value is not allowed; the message holds it.
    """

    def __init__(
        self,
        *,
        merged_eval: bool = True,
        save: Kind = "adapter",
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        exclude_modules: str | Sequence[str] | None = None,
        modules_to_save: Sequence[str] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        bias: Bias = "none",
        use_rslora: bool = False,
        init_lora_weights: bool | Init = True,
        enable_lora: Mapping[str, Sequence[bool]] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        given = dict(locals())
        self.config = LoRAConfig(**{field.name: given[field.name] for field in fields(LoRAConfig)})
        self.merged_eval = merged_eval
        self.save = save
        self._merged: nn.Module | None = None

    # --- in the order in which Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt what exists, before the optimizer exists and the strategy wraps; the rest after configure_model."""
        found = find_injection(pl_module)
        if found is None:
            begin_injection(pl_module, self.config)
            if is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module):
                patch(pl_module, "configure_model", _configure_and_adapt)
            else:
                finish_injection(pl_module)
        else:
            self._adopt(pl_module)
        save_as(pl_module, self.save)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what training stands on, and say in one line what is trained."""
        _refuse_unoptimized(trainer, pl_module)
        if self.save == "merged":
            refuse_unmergeable(pl_module)
        injection = find_injection(pl_module)
        if injection is not None and not injection[2].fingerprint:
            injection[2].fingerprint = fingerprint(pl_module)
        rank_zero_info(summary(pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Training is unmerged, whatever happened before."""
        if is_merged(pl_module):
            unmerge(pl_module)
            self._merged = None
        if batch_idx == 0:
            note_trainable(pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Merge at the first batch: weight averaging swaps weights after on_validation_start."""
        self._merge(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Unmerge before weight averaging swaps back."""
        self._unmerge()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation."""
        self._merge(pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A tested model is left as it was found."""
        self._unmerge()

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation."""
        self._merge(pl_module)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in testing."""
        self._unmerge()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Neither the epoch's end nor teardown is called after an exception or Ctrl-C."""
        self._unmerge()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The last chance to leave the model as it was found."""
        self._unmerge()

    # --- helpers ---

    def _adopt(self, pl_module: pl.LightningModule) -> None:
        """A model injected before, by this callback or by the user: every option that is given must be the same."""
        injection = require_injection(pl_module, "LoRACallback")[2]
        if injection.merge_weights:
            raise LoRAError(
                "LoRACallback: the model was injected with merge_weights=True, where eval() merges: a backbone kept "
                "in eval mode would silently stop training. Call inject(model, config) without it."
            )
        default = LoRAConfig()
        for option in injection.config.differing(self.config):
            ours, theirs = getattr(self.config, option), getattr(injection.config, option)
            if ours != getattr(default, option):
                raise LoRAError(
                    f"LoRACallback: {option} is {ours!r}, but the model was injected with {theirs!r}; use the same, "
                    "give no adapter option, or unload(model) first."
                )

    def _merge(self, pl_module: pl.LightningModule) -> None:
        if self.merged_eval and self._merged is None and not is_merged(pl_module):
            merge(pl_module)
            self._merged = pl_module

    def _unmerge(self) -> None:
        if self._merged is not None:
            module, self._merged = self._merged, None
            unmerge(module)


def summary(model: nn.Module) -> str:
    """One line: adapted layers, trainable of total parameters, adapter size."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    layers = adapted_layers(model)
    size = sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers.values())
    return (
        f"LoRA: {len(layers)} adapted layers, {trainable:,} of {total:,} parameters trainable "
        f"({trainable / max(total, 1):.2%}), adapter {size / 1e6:.3g} MB"
    )


def _configure_and_adapt(module: pl.LightningModule, previous: Callable[[], Any] | None) -> None:
    """The patched configure_model: adapts what setup and configure_model built, then judges the options."""
    delattr(module, "configure_model")
    if previous is not None:
        module.configure_model = previous  # type: ignore[method-assign]
    call_previous(module, previous, "configure_model")
    adapt_new_layers(module)
    note_initial(module)
    finish_injection(module)


def _refuse_unoptimized(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    held = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, layer in adapted_layers(module).items():
        for leaf, factor in ((A, layer.lora_A), (B, layer.lora_B)):
            if factor.requires_grad and id(factor) not in held:
                raise LoRAError(
                    f"LoRACallback: no optimizer holds the adapter parameter {name + '.' + leaf!r}, so it would never "
                    "be trained. Build the optimizer in configure_optimizers from self.parameters() at that time, not "
                    "from parameters collected in __init__."
                )
