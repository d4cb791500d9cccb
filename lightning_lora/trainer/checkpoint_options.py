"""Take the options that LoRACallback leaves out from the checkpoint that its Trainer is about to load."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import nn

from ..config import LoRAConfig, options_that_decide
from ..errors import LoRAError
from ..exchange.fit_checks import chosen_by
from ..files.torch_archive import read_torch_file
from ..formats.forms import refuse_peft_folder
from ..formats.lightning_checkpoint import adapter_in_checkpoint
from ..model.injection import Chosen
from ..names import META
from ..nn.parameter import weights_of
from ..private.lightning import checkpoint_of

SELECTING = {option.name for option in fields(LoRAConfig)}.difference(options_that_decide("training"))
ONE_CHOICE = {*options_that_decide("variant")}  # to give one of these options is to give the others


class Saved(NamedTuple):
    """The options of an adapter in a checkpoint, and what it adapts and trains."""

    config: LoRAConfig
    chosen: Chosen


def options_in_checkpoint(trainer: Any) -> Saved | None:
    """Return the options and layers of the adapter in the checkpoint that a Trainer in setup is about to load.

    The base's values are not read, and no code of the file is run.

    Returns:
        None where the Trainer loads no checkpoint, or one without an adapter, or none on this machine, or one that
        cannot be read, which the Trainer then says itself.

    Raises:
        LoRAError: the adapter's description in the file is damaged, or this program does not know its variant.
    """
    path = checkpoint_of(trainer)
    if path is None:
        return None
    try:
        checkpoint = read_torch_file(path, mmap=True, plain=[META])
    except LoRAError:
        return None
    adapter = adapter_in_checkpoint(checkpoint)[0] if META in checkpoint else None
    if adapter is None or adapter.config is None:
        return None
    return Saved(adapter.config, chosen_by(adapter))


def refuse_folder_for_checkpoint(trainer: Any) -> None:
    """Raise LoRAError where a Trainer in setup is about to load a PEFT folder as its checkpoint."""
    path = checkpoint_of(trainer)
    if isinstance(path, (str, os.PathLike)):
        refuse_peft_folder(path)


def layers_in_checkpoint(saved: Saved, config: LoRAConfig, module: nn.Module) -> Chosen | None:
    """Return the layers of a checkpoint's adapter, where the callback's options say nothing else of them.

    The options in a file are those of the run that trained the adapter first, perhaps in another module.

    Args:
        saved: of the checkpoint.
        config: the callback's options, completed.
        module: the LightningModule.

    Returns:
        None where an option that selects something is another than the checkpoint's, or where the module lacks a layer,
        which it may build later. Then the given options count.
    """
    modules = dict(module.named_modules())
    here = modules.keys() | weights_of(modules).keys()
    are_here = here >= saved.chosen.layers.keys()
    return saved.chosen if are_here and SELECTING.isdisjoint(config.differing(saved.config)) else None


def complete_options(config: LoRAConfig, given: Collection[str], saved: LoRAConfig) -> LoRAConfig:
    """Return a callback's options, with those of a checkpoint in place of options that were left out.

    Args:
        config: the callback's options.
        given: the names of the options that the user gave.
        saved: the checkpoint's options.

    Returns:
        The callback's options unchanged where those that were given do not go with the checkpoint's. Loading it then
        names the difference.
    """
    given = {option.name for option in fields(LoRAConfig)} & {*given, *(ONE_CHOICE if ONE_CHOICE & set(given) else ())}
    try:
        return replace(saved, **{name: getattr(config, name) for name in given})
    except LoRAError:
        return config
