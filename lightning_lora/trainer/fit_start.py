"""What LoRACallback does when a fit starts: check that the adapter can be trained and saved, show what is trained."""

from __future__ import annotations

from typing import Any

from ..exchange.take import fingerprint_of
from ..model.adapted_model import AdaptedModel, open_model
from ..model.dequantize import dequantize_dtype
from ..model.heads import warn_of_new_heads
from ..model.initial_values import snapshot_materialised
from ..model.layers_by_kind import BY_NAME
from ..model.live_state import open_state
from ..model.reasons import refuse_never_quantized
from ..model.recorded_layers import refuse_replaced_layers
from ..model.state_dict import refuse_unmergeable
from ..nn.gradient_checkpointing import enable_input_require_grads
from ..notices import tell
from ..private.lightning import add_hyperparameters
from ..report.summary import summarise
from .after_fit import refuse_merge_after_fit
from .compatibility import refuse_unoptimized
from .hyperparameters import as_hyperparameters
from .options import LOGGED, Options
from .precision import refuse_for_quantized, refuse_full_of_quantized, refuse_plain
from .run_state import run_of


def open_for_fit(module: Any) -> AdaptedModel:
    """Return the handle of a LightningModule that is about to be fitted, whose layers may have changed since setup."""
    return open_model(module, "LoRACallback")


def check_fit(trainer: Any, handle: AdaptedModel, options: Options) -> None:
    """Check that the adapter of a LightningModule can be trained, and then saved as the options say.

    Raises:
        LoRAError: it cannot.
    """
    refuse_replaced_layers(handle, "LoRACallback")
    snapshot_materialised(handle)
    refuse_unoptimized(trainer.optimizers, handle)
    saved = handle.injection.config.modules_to_save or ()
    refuse_never_quantized(handle.modules, handle.injection.config, "LoRACallback")
    warn_of_new_heads(handle.modules, saved)
    enable_input_require_grads([module for _, module in handle.modules])
    refuse_for_quantized(handle, trainer)
    refuse_plain(handle, options.quantize)
    if options.save == "full":
        refuse_full_of_quantized(handle)
    if options.save == "merged":
        refuse_unmergeable(handle, dequantize_dtype(options.dequantize, "LoRACallback"))
    if options.merge_after_fit:
        refuse_merge_after_fit(trainer, handle)


def record_fit(trainer: Any, handle: AdaptedModel, options: Options) -> None:
    """Record the base's fingerprint and whether evaluations merge; log the options and show the summary. In place."""
    injection = handle.injection
    run = run_of(injection)
    run.looked_at = frozenset()
    handle.record_trainable(untouched=True)  # what setup and configure_optimizers unfroze
    if not handle.fingerprint():
        handle.set_fingerprint(fingerprint_of(open_state(handle)))
    run.merged_eval = options.merged_eval
    if trainer.loggers:
        own = {name: getattr(options, name) for name in LOGGED}
        if injection.attached:
            own["attach"] = {name: each.strength for name, each in sorted(injection.attached.items())}
        add_hyperparameters(handle.model, as_hyperparameters(injection.config, **own))
    if options.verbose:
        found = summarise(handle)
        tell(found.short())
        for each in found.left_out:
            if each.reason.startswith(BY_NAME):  # the summary cuts its lines
                tell(f"lightning_lora: {each.reason}")
        if "trained" in injection.marks and not trainer.ckpt_path:
            tell(
                "lightning_lora: training goes on from the adapter that the model holds. For a new one, unload(model) "
                "first."
            )
        if found.unmerged:
            injection.marks.add("quantized")
