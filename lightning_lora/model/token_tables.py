"""Find the tables and rows that trainable_token_indices names in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..distributed.flat import own_weight
from ..errors import LoRAError
from ..matching import matcher, near_misses
from ..nn.adapted_weights import NamedModules
from ..nn.token_rows import is_table
from .pretrained import input_embeddings, pretrained_models

OPTION = "trainable_token_indices"
USUAL_NAME = "embed_tokens"  # as in PEFT, a list means this table in a model that does not name its input embeddings

Rows = tuple[int, ...]
Indices = Sequence[int] | Mapping[str, Sequence[int]] | None


class TokenTables:
    """The tables in a model that have trained rows.

    Attributes:
        rows: the trained rows of each table, by the table's name. A table that is tied to a named table has its rows.
        unmatched: a sentence for each entry that names no table.

    Raises:
        LoRAError: two entries give different rows to one table or to tied tables.
    """

    def __init__(self, listed_modules: NamedModules, indices: Indices) -> None:
        """Find the tables.

        Args:
            listed_modules: every module of the model under its first name, the model first.
            indices: the value of the option.
        """
        modules = {name: module for name, module in listed_modules if name}
        self.rows: dict[str, Rows] = {}
        self.unmatched: list[str] = []
        self._entries: dict[str, str] = {}  # the entry that names each table
        if indices is not None and not isinstance(indices, Mapping):
            self._add_input_embeddings(listed_modules, modules, tuple(indices))
        for entry, rows in indices.items() if isinstance(indices, Mapping) else ():
            self._add_matching(entry, tuple(rows), modules)
        self._add_tied(modules)
        self.rows = {name: self.rows[name] for name in modules if name in self.rows}  # in the model's order

    def _add_input_embeddings(self, listed_modules: NamedModules, modules: Mapping[str, nn.Module], rows: Rows) -> None:
        tables = [input_embeddings(pretrained) for pretrained in pretrained_models(listed_modules).values()]
        names = [name for name, module in listed_modules if any(module is table for table in tables)]
        if len(names) > 1:
            kind = type(listed_modules[0][1]).__name__
            raise LoRAError(
                f"inject: {OPTION} is a list, but {kind} holds {len(names)} transformers models; name "
                f"the table: {{{names[0]!r}: {list(rows)}}}."
            )
        if names:
            self._add(names[0], rows, "a list")
        else:
            self._add_matching(USUAL_NAME, rows, modules)

    def _add_matching(self, entry: str, rows: Rows, modules: Mapping[str, nn.Module]) -> None:
        named = list(filter(matcher([entry]), modules))
        for name in named:
            self._add(name, rows, repr(entry))
        if not named:
            hint = near_misses(entry, [name for name, module in modules.items() if is_table(module)])
            self.unmatched.append(f"{OPTION}: {entry!r} names no table{hint}")

    def _add_tied(self, modules: Mapping[str, nn.Module]) -> None:
        named = [name for name in modules if name in self.rows]
        owners = {id(own_weight(modules[name])): name for name in named if own_weight(modules[name]) is not None}
        for name, module in modules.items() if owners else ():
            owner = owners.get(id(own_weight(module)))
            if owner is not None and is_table(module):
                self._add(name, self.rows[owner], f"{owner!r}, with which it shares its weight")

    def _add(self, name: str, rows: Rows, entry: str) -> None:
        if self.rows.setdefault(name, rows) != rows:
            raise LoRAError(
                f"inject: {OPTION} gives {name!r} the rows {list(self.rows[name])} by {self._entries[name]}, and "
                f"{list(rows)} by {entry}; give one list for both, or untie them first."
            )
        self._entries.setdefault(name, entry)
