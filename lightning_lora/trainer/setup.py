"""What LoRACallback does in setup: adapt the LightningModule, and patch those of its methods that no hook reaches."""

from __future__ import annotations

from typing import Any

from ..model.adapted_model import find_model
from ..model.inject import random_seed
from .after_fit import forget_merging, is_merged_for_good, load_plain_weights_only
from .checkpoint_options import complete_options, options_in_checkpoint, refuse_folder_for_checkpoint
from .cli_optimizer import adapt_cli_optimizer
from .compatibility import refuse_composition
from .late_layers import adapt_in_setup
from .options import Options


def set_up(trainer: Any, module: Any, options: Options, stage: str) -> None:
    """Adapt the module before the optimizer is built and the strategy wraps; patch the module's hooks. In place.

    A module that an earlier fit merged for good is evaluated as it is.

    Args:
        trainer: in its setup.
        module: the LightningModule, injected or not.
        options: the LoRACallback.
        stage: "fit", "validate", "test" or "predict".

    Raises:
        LoRAError: the Trainer, its callbacks or the model do not go with these options.
    """
    is_injected = find_model(module) is not None
    refuse_composition(trainer, options, injected=is_injected)
    refuse_folder_for_checkpoint(trainer)
    if is_merged_for_good(module):
        if not is_injected and stage != "fit":
            load_plain_weights_only(module)
            return
        forget_merging(module)
    saved = None if is_injected else options_in_checkpoint(trainer)
    seed, saved = trainer.strategy.broadcast((random_seed(), saved))  # also where this process alone is injected
    config = options.config if saved is None else complete_options(options.config, options.given, saved)
    adapt_cli_optimizer(module)
    adapt_in_setup(module, options, config, seed)
