"""Take the options that LoRACallback leaves out from the checkpoint that its Trainer is about to load."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

from ..config import VARIANTS, LoRAConfig
from ..errors import LoRAError
from ..files.torch_archive import read_torch_file
from ..formats.forms import refuse_peft_folder
from ..formats.lightning_checkpoint import adapter_of
from ..names import META

ONE_CHOICE = {"variant", *VARIANTS}  # to give one of these options is to give the others


def options_in_checkpoint(trainer: Any) -> LoRAConfig | None:
    """Return the options of the adapter in the checkpoint that a Trainer in setup is about to load.

    The base's values are not read, and no code of the file is run.

    Returns:
        None where the Trainer loads no checkpoint, or one without an adapter, or none on this machine, or one that
        cannot be read, which the Trainer then says itself.

    Raises:
        LoRAError: the adapter's description in the file is damaged, or this program does not know its variant.
    """
    path = _checkpoint_of(trainer)
    if path is None:
        return None
    try:
        checkpoint = read_torch_file(path, mmap=True)
    except LoRAError:
        return None
    return adapter_of(checkpoint)[0].config if META in checkpoint else None


def refuse_folder_for_checkpoint(trainer: Any) -> None:
    """Raise LoRAError where a Trainer in setup is about to load a PEFT folder as its checkpoint."""
    path = _checkpoint_of(trainer)
    if isinstance(path, (str, os.PathLike)):
        refuse_peft_folder(path)


def _checkpoint_of(trainer: Any) -> str | os.PathLike[str] | None:
    """Return the path of the checkpoint that a Trainer in setup is about to load, for "best" and the like too.

    Lightning keeps it in an argument of Trainer._run, which calls setup. trainer.ckpt_path is set when setup is over,
    and until then it is that of the run before.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
    return None


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
