"""LoRACallback's options, as the functions of this folder read them, and the check of its own."""

from __future__ import annotations

from typing import Protocol

import torch

from ..config import LoRAConfig
from ..errors import LoRAError
from ..formats.lightning_checkpoint import Kind, check_kind
from ..model.dequantize import dequantize_dtype
from ..model.inject import fixed_seed
from ..model.quantise import check_kind_of_quantisation

BOOLEANS = ("merged_eval", "merge_after_fit", "verbose")
LOGGED = ("save", "merged_eval", "quantize", "seed")  # those that tell runs apart, for loggers


class Options(Protocol):
    """What the functions of this folder know of a LoRACallback, which describes each option."""

    config: LoRAConfig
    given: frozenset[str]  # the options that the user gave; others are at their defaults
    merged_eval: bool
    save: Kind
    seed: int | None
    merge_after_fit: bool
    quantize: str | None
    dequantize: str | torch.dtype | None
    verbose: bool


def check_own_options(options: Options) -> None:
    """Raise LoRAError if an option of the callback has a value that is not allowed. LoRAConfig checks its own."""
    check_kind(options.save)
    if options.quantize is not None:
        check_kind_of_quantisation(options.quantize, "LoRACallback")
    dequantize_dtype(options.dequantize, "LoRACallback")
    for name in BOOLEANS:
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise LoRAError(f"LoRACallback: {name} must be true or false, but it is {value!r}.")
    seed_text(options)


def seed_text(options: Options) -> str:
    """Return the text of the seed that the adapters are drawn from, or "" if none was given."""
    return "" if options.seed is None else fixed_seed(options.seed, "LoRACallback")
