"""What LoRACallback does when a fit starts: check that the adapter can be trained and saved, show what is trained."""

from __future__ import annotations

from typing import Any

from ..adapter.take import fingerprint
from ..model.dequantise import dequantised_dtype
from ..model.injection import find_injection, refuse_replaced_layers, snapshot_materialised
from ..model.large_adapters import warn_of_large_adapters
from ..model.passed_over import warn_of_passed_over
from ..model.pretrained import warn_of_new_heads
from ..model.state_dict import refuse_unmergeable
from ..nn.gradient_checkpointing import enable_input_require_grads
from ..notices import show
from ..report.summary import summary
from .after_fit import refuse_merge_after_fit
from .compatibility import refuse_unoptimized, warn_of_frozen, warn_of_idle_optimizers
from .eval_mode import explain_eval_mode
from .hyperparameters import LoggedOptions, as_hyperparameters
from .options import Options
from .precision import refuse_for_quantised, refuse_unloadable
from .start_batches import start_from_data


def check_fit(trainer: Any, module: Any, options: Options) -> None:
    """Check that the adapter of a LightningModule can be trained, and then saved as the options say.

    Raises:
        LoRAError: it cannot.
    """
    refuse_replaced_layers(module, "LoRACallback")
    snapshot_materialised(module)
    refuse_unoptimized(trainer.optimizers, module)
    warn_of_frozen(module)
    warn_of_idle_optimizers(trainer.optimizers, module)
    warn_of_new_heads(module)
    warn_of_large_adapters(module)
    injected = find_injection(module)
    if injected is not None:
        warn_of_passed_over(injected.record)
    enable_input_require_grads(module)
    refuse_for_quantised(module, trainer)
    if options.save == "full":
        refuse_unloadable(module)
    if options.save == "merged":
        refuse_unmergeable(module, dequantised_dtype(options.dequantize, "LoRACallback"))
    if options.merge_after_fit:
        refuse_merge_after_fit(trainer, module)


def record_fit(trainer: Any, module: Any, options: Options, logged: LoggedOptions) -> None:
    """Record the base's fingerprint and whether evaluations merge; log the options and show the summary. In place."""
    injected = find_injection(module)
    if injected is not None:
        record = injected.record
        if not record.fingerprint:
            record.fingerprint = fingerprint(module)
        record.merged_eval, record.last_merge = options.merged_eval, None
        if trainer.loggers:
            given = as_hyperparameters(record.config, save=options.save, merged_eval=options.merged_eval)
            logged.add(module, given)
    if options.verbose:
        show(summary(module))


def start_training(trainer: Any, module: Any, options: Options) -> None:
    """Start from data where the options say so; explain Lightning's warning of modules in eval mode."""
    start_from_data(trainer, module, find_injection(module))
    if options.verbose:
        explain_eval_mode(trainer, module)
