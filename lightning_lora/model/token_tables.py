"""Find the tables and rows that trainable_token_indices names in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..distributed.flat import own_weight
from ..errors import LoRAError
from ..matching import Unmatched, matcher
from ..nn.adapted_module import NamedModules
from ..nn.token_rows import is_table
from .pretrained import input_embeddings, pretrained_models

OPTION = "trainable_token_indices"
USUAL_NAME = "embed_tokens"  # as in PEFT, a list means this table in a model that does not name its input embeddings

Rows = tuple[int, ...]
Indices = Sequence[int] | Mapping[str, Sequence[int]] | None


def token_tables(listed_modules: NamedModules, indices: Indices, unmatched: Unmatched) -> dict[str, Rows]:
    """Return the trained rows of each table, by the table's name. A table that is tied to a named table has its rows.

    Args:
        listed_modules: every module of the model under its first name, the model first.
        indices: the value of the option.
        unmatched: takes the entries that name no table. In place.

    Raises:
        LoRAError: two entries give different rows to one table or to tied tables.
    """
    if indices is None:
        return {}
    modules = {name: module for name, module in listed_modules if name}
    entries = indices if isinstance(indices, Mapping) else {_input_embeddings(listed_modules, indices): indices}
    unmatched.note(OPTION, entries, modules, "table", [name for name, module in modules.items() if is_table(module)])
    found = dict[str, Rows]()
    for entry, rows in entries.items():
        for name in filter(matcher([entry]), modules):
            _add(found, name, tuple(rows), repr(entry))
    return with_tied_tables(found, modules)


def with_tied_tables(tables: Mapping[str, Rows], modules: Mapping[str, nn.Module]) -> dict[str, Rows]:
    """Return the rows of each table in `tables`, and of each that is tied to one of these, in the model's order.

    Raises:
        LoRAError: tied tables have different rows.
    """
    found, owners = dict(tables), dict[int, str]()
    for name in tables:
        owners.setdefault(id(own_weight(modules[name])), name)
    owners.pop(id(None), None)
    for name, module in modules.items():
        owner = owners.get(id(own_weight(module)))
        if owner is not None and is_table(module):
            _add(found, name, found[owner], f"{owner!r}, with which it shares its weight")
    return {name: found[name] for name in modules if name in found}  # in the model's order


def _input_embeddings(listed_modules: NamedModules, rows: Sequence[int]) -> str:
    """Return the name of the table that a list means: the input embeddings of the only transformers model."""
    tables = [input_embeddings(pretrained) for pretrained in pretrained_models(listed_modules).values()]
    names = [name for name, module in listed_modules if any(module is table for table in tables)]
    if len(names) > 1:
        raise LoRAError(
            f"inject: {OPTION} is a list, but {type(listed_modules[0][1]).__name__} holds {len(names)} transformers "
            f"models; name the table: {{{names[0]!r}: {list(rows)}}}."
        )
    return names[0] if names else USUAL_NAME


def _add(found: dict[str, Rows], name: str, rows: Rows, entry: str) -> None:
    if found.setdefault(name, rows) != rows:
        raise LoRAError(
            f"inject: {OPTION} gives {name!r} the rows {list(found[name])}, and {list(rows)} by {entry}; give one list "
            "for both, or untie them first."
        )
