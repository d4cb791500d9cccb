"""Checks of an adapter by itself: its tensors are there, finite, and as its variant says."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..errors import LoRAError
from ..nn.variant import rows_leaf, variant_with
from .adapter import Adapter, layer_fault
from .values import check_finite, describe_value, holds_numbers, refuse_nested


def check_factors(adapter: Adapter, where: str) -> None:
    """Raise LoRAError for the first layer whose tensors are not finite, or not as its variant says."""
    for layer in adapter.own_names:
        _refuse_fault(adapter, layer, where)
    for table, rows in adapter.rows().items():
        _check_rows(adapter, table, rows, where)
    refuse_nested(adapter.whole_tensors(), where)


def _refuse_fault(adapter: Adapter, layer: str, where: str) -> None:
    """Raise LoRAError for the first fault in the tensors of one layer."""
    names, variant = adapter.own_names[layer], adapter.variant
    rows = rows_leaf()
    own = {leaf: name for leaf, name in names.items() if leaf != rows}
    if not layer:
        raise LoRAError(f"{where}: {next(iter(names.values()))!r} names no layer.")
    if not own:
        return
    unexpected = next((leaf for leaf in own if leaf not in variant.leaves), None)
    if unexpected is not None:
        options = variant_with({unexpected}).options()  # of the variant that has such a tensor
        asked_by = ", ".join(f"{option}={json.dumps(value)}" for option, value in options.items())
        raise LoRAError(
            f"{where}: {own[unexpected]!r} is of no adapted layer, or {asked_by} is missing in the options; the file "
            "is damaged."
        )
    fault = layer_fault(adapter, layer)
    if fault:
        raise LoRAError(f"{where}: {fault}")
    for leaf, value in adapter.stored(layer).items():
        check_finite(names[leaf], value, where)


def require_values(adapter: Adapter, where: str) -> None:
    """Raise LoRAError where a tensor of a file is on the meta device, so that it has no values."""
    for name, value in {**adapter.tensors, **adapter.base}.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise LoRAError(f"{where}: {name!r} has no values: it was saved from the meta device.")


def _check_rows(adapter: Adapter, table: str, rows: Any, where: str) -> None:
    """Raise LoRAError where a table's trained rows are no finite matrix, or not as many as their numbers."""
    name, numbers = f"{table}.{rows_leaf()}", adapter.tables.get(table)
    if not holds_numbers(rows) or rows.dim() != 2:
        raise LoRAError(f"{where}: {name!r} must be a floating point matrix of rows, found {describe_value(rows)}.")
    if numbers is not None and len(numbers) != len(rows):
        raise LoRAError(f"{where}: {name!r} has {len(rows)} rows, but {len(numbers)} are named: the file is damaged.")
    check_finite(name, rows, where)
