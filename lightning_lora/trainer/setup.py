"""What LoRACallback does in setup: adapt the LightningModule, and patch those of its methods that no hook reaches."""

from __future__ import annotations

from typing import Any

from ..model.inject import begin_injection, random_seed
from ..model.injection import Injected, find_injection
from .after_fit import forget_merging, is_merged_for_good, load_plain_weights_only
from .checkpoint_hooks import save_as
from .cli_optimizer import adapt_cli_optimizer
from .compatibility import refuse_composition, refuse_other_options, warn_of_part
from .options import Options, seed_text
from .precision import convert_linear_layers_, leave_out_of_ddp_, refuse_for_quantised, refuse_late_conversion


def set_up(trainer: Any, module: Any, options: Options, stage: str) -> bool:
    """Adapt what exists, before the optimizer is built and the strategy wraps; patch the module's hooks. In place.

    Args:
        trainer: in its setup.
        module: the LightningModule, injected or not.
        options: the LoRACallback.
        stage: "fit", "validate", "test" or "predict".

    Returns:
        Whether the module is adapted; one that an earlier fit merged for good is evaluated as it is.

    Raises:
        LoRAError: the Trainer, its callbacks or the model do not go with these options.
    """
    injected = find_injection(module)
    refuse_composition(trainer, options, injected=injected is not None)
    if is_merged_for_good(module):
        if injected is None and stage != "fit":
            load_plain_weights_only(module)
            return False
        forget_merging(module)
    _inject_or_adopt(trainer, module, options, injected)
    adapt_cli_optimizer(module, options.lr_ratio, is_fit=stage == "fit")
    refuse_for_quantised(module, trainer)
    leave_out_of_ddp_(module)
    save_as(module, options.save, options.dequantize)
    return True


def _inject_or_adopt(trainer: Any, module: Any, options: Options, injected: Injected | None) -> None:
    """Inject the module, or check that its earlier injection agrees with the options. In place."""
    if injected is None:
        convert_linear_layers_(module)
        seed = seed_text(options) or trainer.strategy.broadcast(random_seed())
        begin_injection(module, options.config, seed=seed, given=options.given)
    else:
        refuse_late_conversion(module)
        refuse_other_options(injected.record, options.config, options.given, seed_text(options))
        warn_of_part(trainer, injected.prefix.removesuffix("."))
