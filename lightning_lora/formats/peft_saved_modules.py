"""modules_to_save as PEFT means it: every module whose name ends in an entry, in the middle of a segment too.

`head` takes lm_head, and `norm` takes input_layernorm. PEFT wants all tensors of each module that it takes in the file.
It trains a copy of each module. So one end of tied weights is trained alone, or both ends are trained apart. The option
ensure_weight_tying changes that for modules that are called embed_tokens and lm_head.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..adapter.adapter import Adapter
from ..config import LoRAConfig
from ..errors import LoRAError
from ..matching import matcher
from ..names import parent_names
from .equal_tables import equal_tables, ties_of

TIED_BY_PEFT = ("embed_tokens", "lm_head")  # the names of modules that ensure_weight_tying knows


def entries_in(options: Mapping[str, Any]) -> list[str]:
    """Return modules_to_save out of adapter_config.json's fields."""
    entries = options.get("modules_to_save")
    return [entry for entry in entries if isinstance(entry, str) and entry] if isinstance(entries, list) else []


def from_peft_entries(entries: Iterable[str], whole: Iterable[str]) -> list[str]:
    """Translate PEFT's entries into dotted suffixes of module names.

    Args:
        entries: PEFT's modules_to_save. PEFT adds entries that may name nothing; these are left out.
        whole: names of parameters that the file holds whole.
    """
    taken: dict[str, set[str]] = {entry: set() for entry in entries}
    for module in {module for name in whole for module in parent_names(name)}:
        for start in range(len(module)):  # one look-up for each ending: there may be as many entries as modules
            entry = module[start:]
            if entry in taken:
                taken[entry].add(".".join(module.split(".")[-1 - entry.count(".") :]))
    in_order = ([*sorted(names & {entry}), *sorted(names - {entry})] for entry, names in taken.items())
    return list(dict.fromkeys(itertools.chain.from_iterable(in_order)))


def to_peft_entries(adapter: Adapter) -> list[str] | None:
    """Return PEFT's modules_to_save for an adapter: its own entries, or full names where those would take more."""
    entries = (adapter.config or LoRAConfig()).all_modules_to_save()
    if not entries:
        return None
    if _taken_besides(adapter, entries):
        full_names = sorted(filter(matcher(entries), adapter.modules))
        entries = min(entries, full_names, key=lambda names: len(_taken_besides(adapter, names)))
    if not is_tied_by_peft(adapter):
        ends = ties_of(_names_saved(adapter), adapter.whole_tensors())
        entries += sorted(name.rpartition(".")[0] for name in ends)
    return entries or None


def frozen_in_saved(adapter: Adapter) -> list[str]:
    """Return the names of frozen tensors that PEFT wants in the file: they lie in modules that its entries take.

    Raises:
        LoRAError: PEFT's entries take an adapted layer too, and PEFT cannot do both.
    """
    taken = _taken_besides(adapter, to_peft_entries(adapter) or ())
    layers = [layer for layer in (*adapter.layers, *adapter.tables) if layer in taken]
    if layers:
        raise LoRAError(
            f"save_adapter: PEFT's modules_to_save takes every module whose name ends in an entry, so that "
            f"{layers[0]!r}, which is adapted, would be trained whole too. Save a Lightning checkpoint instead; for a "
            f"folder, train with {layers[0].rpartition('.')[2]!r} in modules_to_save or exclude_modules."
        )
    return taken


def is_tied_by_peft(adapter: Adapter) -> bool:
    """Return whether both ends of a tie were trained as one and PEFT's ensure_weight_tying can express it."""
    entries = (adapter.config.modules_to_save if adapter.config is not None else None) or ()
    if not any(entry.rpartition(".")[2] in TIED_BY_PEFT for entry in entries):
        return False
    saved = _names_saved(adapter)
    return any(group & saved for group in equal_tables(adapter.whole_tensors()))


def _names_saved(adapter: Adapter) -> set[str]:
    is_saved = matcher(adapter.config.all_modules_to_save() if adapter.config is not None else None)
    return {name for name in adapter.whole_tensors() if any(map(is_saved, parent_names(name)))}


def _taken_besides(adapter: Adapter, entries: Collection[str]) -> list[str]:
    """Return the frozen tensors and adapted layers in modules that PEFT's entries take."""
    if not entries:
        return []
    frozen = sorted(adapter.fingerprint.keys() - adapter.tensors.keys())
    inside = {name: parent_names(name) for name in frozen}
    inside |= {name: [*parent_names(name), name, f"{name}.base_layer"] for name in adapter.layers}  # as PEFT wraps it
    inside |= {name: [*parent_names(name), name, f"{name}.token_adapter.base_layer"] for name in adapter.tables}
    ends = tuple(entries)
    return [name for name, modules in inside.items() if any(module.endswith(ends) for module in modules)]
