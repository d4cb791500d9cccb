"""What LoRACallback does in setup: adapt the LightningModule, and patch those of its methods that no hook reaches."""

from __future__ import annotations

from typing import Any

from ..config import LoRAConfig
from ..model.adapted_model import AdaptedModel, Listing, find_model
from ..model.inject import begin_injection, random_seed
from ..model.quantise import quantise_
from ..model.rebuilt_modules import adopt_layers
from .after_fit import forget_merging, load_plain_weights_only
from .checkpoint_hooks import save_as
from .checkpoint_options import complete_options, options_in_checkpoint, refuse_folder_for_checkpoint
from .cli_optimizer import adapt_cli_optimizer
from .compatibility import refuse_composition, refuse_other_options
from .options import Options, seed_text
from .precision import convert_linear_layers_, leave_out_of_ddp_, refuse_for_quantised, refuse_late_conversion
from .record import is_merged_for_good


def set_up(trainer: Any, module: Any, options: Options, stage: str) -> AdaptedModel | None:
    """Adapt what exists, before the optimizer is built and the strategy wraps; patch the module's hooks. In place.

    Args:
        trainer: in its setup.
        module: the LightningModule, injected or not.
        options: the LoRACallback.
        stage: "fit", "validate", "test" or "predict".

    Returns:
        The handle of the adapted module; None for one that an earlier fit merged for good, evaluated as it is.

    Raises:
        LoRAError: the Trainer, its callbacks or the model do not go with these options.
    """
    handle = find_model(module)
    refuse_composition(trainer, options, injected=handle is not None)
    refuse_folder_for_checkpoint(trainer)
    if is_merged_for_good(module):
        if handle is None and stage != "fit":
            load_plain_weights_only(module)
            return None
        forget_merging(module)
    saved = options_in_checkpoint(trainer) if handle is None else None
    seed, saved = trainer.strategy.broadcast((random_seed(), saved))  # also where this process alone is injected
    if handle is None:
        config = options.config if saved is None else complete_options(options.config, options.given, saved)
        handle = _inject(module, options, config, seed)
    else:
        _adopt(handle, options)
    adapt_cli_optimizer(module)
    refuse_for_quantised(handle, trainer)
    leave_out_of_ddp_(handle)
    save_as(handle, options.save, options.dequantize)
    return handle


def _inject(module: Any, options: Options, config: LoRAConfig, seed: str) -> AdaptedModel:
    """Inject the module with the options of `config`, and return its handle. In place.

    `seed` is for adapters whose options give none.
    """
    listing = Listing(module)
    convert_linear_layers_(listing)
    if options.quantize is not None:
        quantise_(listing, options.quantize, config)
    handle = begin_injection(listing, config, seed=seed_text(options) or seed, given=options.given)
    handle.record.quantize = options.quantize
    return handle


def _adopt(handle: AdaptedModel, options: Options) -> None:
    """Check that the earlier injection of a module agrees with the options, and take it over. In place."""
    adopt_layers(handle)
    refuse_late_conversion(handle)
    refuse_other_options(handle.record, options.config, options.given, seed_text(options))
