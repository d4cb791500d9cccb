"""PEFT's trainable_token_indices, from and to ours.

PEFT wraps a table whose rows are trained one by one:

    <table>.token_adapter.trainable_tokens_delta   the rows themselves, in the order of the option's list
    <table>.token_adapter.base_layer.weight        the whole table, where it was resized

PEFT knows no ties but those that transformers makes to its input embeddings. It stores the rows of such tables once,
under the name of the input embeddings, and under each name if they were resized. In PEFT a head with trained rows
computes without its bias (peft 0.21).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..errors import LoRAError
from ..nn.variant import rows_leaf

OPTION = "trainable_token_indices"
WRAPPER = ".token_adapter"
DELTA, TABLE = f"{WRAPPER}.trainable_tokens_delta", f"{WRAPPER}.base_layer"

NO_BIAS = "PEFT computes a head with trained rows without its bias, which gives other outputs"


def as_peft_stores(adapter: Adapter, verb: str) -> Adapter:
    """Return the adapter with the rows of tied tables once, as PEFT has them.

    Raises:
        LoRAError: PEFT cannot apply the rows of a table.
    """
    for table in adapter.rows():
        ends = {table, *(other for other, first in adapter.tied.items() if first == table)}
        others = sorted(other for other in adapter.modules - ends if other.endswith(table))
        problem = ""
        if f"{table}.bias" in adapter.fingerprint or f"{table}.bias" in adapter.tensors:
            problem = f"has trained rows and a bias; {NO_BIAS}"
        elif table in adapter.tied and not adapter.tied_by_peft:
            problem = f"shares its weight with {adapter.tied[table]!r}, and PEFT ties only what transformers does"
        elif table not in adapter.tied and others:
            problem = f"has trained rows, and PEFT would train those of {others[0]!r} too, whose name ends so"
        if problem:
            raise LoRAError(f"{verb}: {table!r} {problem}; save a Lightning checkpoint instead.")
    dropped = {f"{table}.{rows_leaf()}" for table in adapter.tied}
    return replace(
        adapter,
        tensors={name: value for name, value in adapter.tensors.items() if name not in dropped},
        tables={table: rows for table, rows in adapter.tables.items() if table not in adapter.tied},
    )


def peft_table_name(name: str, tables: Collection[str]) -> str:
    """Translate our name of a table's rows or weight into PEFT's; any other name stays."""
    table, _, leaf = name.rpartition(".")
    if leaf == rows_leaf():
        return table + DELTA
    return f"{table}{TABLE}.{leaf}" if table in tables else name


def our_table_name(name: str, present: Collection[str]) -> str:
    """Translate PEFT's tensor name of a table with trained rows; any other name stays."""
    if name.endswith(DELTA):
        return f"{name.removesuffix(DELTA)}.{rows_leaf()}"
    wrapped = f"{TABLE}." in name and any(other.endswith(DELTA) for other in present)
    return name.replace(TABLE, "") if wrapped else name


def rows_from_peft(adapter: Adapter, options: Mapping[str, Any], where: object) -> Adapter:
    """Return the adapter with its trained rows in ascending order, and with their numbers.

    Args:
        adapter: has its rows in PEFT's order, and no options.
        options: the fields of adapter_config.json.
        where: for messages.

    Raises:
        LoRAError: options and tensors do not go together.
    """
    rows, indices = adapter.rows(), options.get(OPTION)
    if not indices and not rows:
        return adapter
    numbers = {table: _numbers_of(_first_end(table, rows, indices), indices, where) for table in rows}
    for entry, order in indices.items() if isinstance(indices, Mapping) else [("", indices)]:
        if not any(table.endswith(entry) for table in rows) and order not in numbers.values():  # else it is tied
            raise LoRAError(f"{where}: {OPTION} names {entry!r}, whose rows are missing; the file was cut.")
    if not isinstance(indices, Mapping) and not all(
        torch.equal(next(iter(rows.values())), each) for each in rows.values()
    ):
        raise LoRAError(f"{where}: {OPTION} is one list, and {list(rows)} have other rows; the file is damaged.")
    tensors, tables = dict(adapter.tensors), {}
    for table, order in numbers.items():
        if rows[table].shape[:1] != (len(order),):
            shape = tuple(rows[table].shape)
            raise LoRAError(f"{where}: {OPTION} names {len(order)} rows of {table!r}, and the file has {shape}.")
        tables[table] = tuple(sorted(order))
        tensors[f"{table}.{rows_leaf()}"] = rows[table][sorted(range(len(order)), key=order.__getitem__)]
    return replace(adapter, tensors=tensors, tables=tables)


def _first_end(table: str, rows: Mapping[str, torch.Tensor], indices: Any) -> str:
    """Return the table that the option names. Tied tables may be listed under another name."""
    if not isinstance(indices, Mapping):
        return table
    named = [other for other in (table, *rows) if any(other.endswith(entry) for entry in indices)]
    return next((other for other in named if torch.equal(rows[other], rows[table])), table)


def _numbers_of(table: str, indices: Any, where: object) -> Sequence[int]:
    """Return the row numbers of a table in the option's order; an entry of the option is an ending of the name."""
    if isinstance(indices, Mapping):
        entries = [entry for entry in indices if isinstance(entry, str) and table.endswith(entry)]
        indices = indices[max(entries, key=len)] if entries else None
    if not isinstance(indices, list) or not all(type(number) is int for number in indices):
        raise LoRAError(f"{where}: the rows of {table!r} are in the file, and {OPTION} does not say which they are.")
    if min(indices, default=0) < 0 or len(set(indices)) < len(indices):
        raise LoRAError(f"{where}: {OPTION} names rows of {table!r} twice, or by negative numbers: {indices!r:.80}.")
    return indices
