"""LoRACallback's options, as the functions of this folder read them, and the check of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from ..config import LoRAConfig
from ..errors import LoRAError, shown
from ..formats.lightning_checkpoint import Kind, check_kind
from ..model.attached import checked_strength
from ..model.dequantize import dequantize_dtype
from ..model.inject import fixed_seed
from ..model.quantize import check_kind_of_quantization

BOOLEANS = ("merged_eval", "merge_after_fit", "verbose")
LOGGED = ("save", "merged_eval", "quantize", "seed")  # those that tell runs apart, for loggers


class Options(Protocol):
    """What the functions of this folder know of a LoRACallback, which describes each option."""

    config: LoRAConfig
    given: frozenset[str]  # the options that the user gave; others are at their defaults
    merged_eval: bool
    save: Kind
    seed: int | None
    attach: Mapping[str, Any] | None
    merge_after_fit: bool
    quantize: str | None
    dequantize: str | torch.dtype | None
    verbose: bool


def check_own_options(options: Options) -> None:
    """Raise LoRAError if an option of the callback has a value that is not allowed. LoRAConfig checks its own."""
    check_kind(options.save)
    if options.quantize is not None:
        check_kind_of_quantization(options.quantize, "LoRACallback")
    dequantize_dtype(options.dequantize, "LoRACallback")
    for name in BOOLEANS:
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise LoRAError(f"LoRACallback: {name} must be true or false, but it is {value!r}.")
    seed_text(options)
    sources_of(options.attach)


class Source(NamedTuple):
    """An adapter of LoRACallback(attach=...): any source that load_adapter takes, and its strength."""

    source: Any
    strength: float | None  # None: none was given, 1 where the adapter is not attached yet


def sources_of(attach: Mapping[str, Any] | None) -> dict[str, Source]:
    """Return the adapters of LoRACallback(attach=...), in the order of names. LoRAError: a value is not allowed."""
    if not isinstance(attach, Mapping | None):
        raise LoRAError(
            "LoRACallback: attach must be a mapping of a name to a source, as {'sft': 'folder'}, but it is "
            f"{shown(attach)}."
        )
    return {name: _source_of(name, each) for name, each in sorted((attach or {}).items())}


def _source_of(name: str, given: Any) -> Source:
    """Return a source that was given by itself, or with a strength."""
    if not (isinstance(given, Mapping) and ("source" in given or given.keys() <= {"strength"})):
        return Source(given, None)
    strength = given.get("strength")
    if "source" not in given or given.keys() - {"source", "strength"}:
        raise LoRAError(
            f"LoRACallback: attach[{name!r}] must be a source or {{'source': ..., 'strength': a number}}, but it is "
            f"{shown(dict(given))}."
        )
    what = f"LoRACallback: attach[{name!r}]"
    return Source(given["source"], checked_strength(strength, what) if "strength" in given else None)


def seed_text(options: Options) -> str:
    """Return the text of the seed that the adapters are drawn from, or "" if none was given."""
    return "" if options.seed is None else fixed_seed(options.seed, "LoRACallback")
