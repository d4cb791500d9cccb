"""Trained rows of a frozen table. A table is an nn.Embedding or an nn.Linear output head; both may be tied.

The adapter of a table is the parameter `lora_rows` (n, dim) beside the weight. It holds the rows themselves and no
differences, so W's values in these rows do not matter. A forward uses the trained rows in place of W's rows, without a
copy of the table. Merging writes them into W, and keeps W's.

Tied tables share one adapter and its parameter, as they share the weight. The adapter is merged once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.sharding import full_tensor, is_sharded, is_spread, rows_of
from ..errors import LoRAError
from .adapted_module import AdaptedModule, StandIns, swapped_class
from .adapted_weights import AdaptedWeights, Blocks, LayerSpec, LayerState
from .low_rank import LowRankBlock, row_blocks, widest_dtype
from .transforms import runs_by_formula
from .variant import ROWS_OPTION, LayerInfo, Reader, Stored, Variant, Weight

ROWS = "lora_rows"  # leaf name: (n, dim)
WEIGHT = "weight"
TOGETHER = 32  # rows of a block of `update_blocks`, in which they are multiplied by a unit matrix


class TrainedRows(Variant):
    """The adapter stores rows of a table, which replace the table's own rows."""

    title = "trained rows"
    trained = (ROWS,)
    asked_by = ROWS_OPTION
    follows_weight = True

    def shapes(self, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return {ROWS: (len(info.rows), info.shape[1])}

    def start(self, info: LayerInfo, weight: Weight) -> dict[str, torch.Tensor]:
        return {ROWS: rows_of(weight(), info.rows)}

    def blocks(self, stored: Stored, info: LayerInfo, read: Reader) -> list[LowRankBlock]:
        return row_blocks(info.rows, stored[ROWS])


class TokenRows(AdaptedWeights):
    """The trained rows of one table or of several tied tables. spec.rows are the ascending numbers of the rows."""

    KIND = ""

    def __init__(self, state: LayerState) -> None:
        self.lora, self.lora_active = state, True
        self.tables: list[LoRATable] = []

    @property
    def lora_holder(self) -> nn.Module:
        return self.tables[0]

    def lora_holders(self) -> list[nn.Module]:
        return list(self.tables)

    @property
    def rows(self) -> nn.Parameter:
        """The trained parameter (n, dim), in the order of spec.rows."""
        return self.tables[0].lora_rows

    def options_text(self) -> str:
        return f"{len(self.lora.spec.rows)} trained rows"

    def stored(self, leaves: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        return {ROWS: self.rows}

    @property
    def weight_leaf(self) -> str:
        return WEIGHT

    def adapted_weight(self) -> nn.Parameter:
        return self.tables[0].weight

    def is_initial(self, *, everywhere: bool = False) -> bool:
        if not everywhere and (self.lora.undo is not None or is_spread(self.rows)):
            return False
        live, start = full_tensor(self.rows).detach(), self.initial_values()[ROWS]
        if live.is_meta or start.is_meta:
            return False
        start = start.to(live.device, live.dtype)
        return bool(((live == start) | (live.isnan() & start.isnan())).all())

    def why_not_merge(self) -> str:
        weight = self.tables[0]._parameters.get(WEIGHT)
        untied = any(table._parameters.get(WEIGHT) is not weight for table in self.tables)
        return super().why_not_merge() or ("tables that were tied at injection are not any more" if untied else "")

    def update_blocks(self, stored: Stored | None = None) -> Blocks:
        """Return rows - W[ids] as products with unit matrices. Values of W that are not finite count as 0.

        A block's position is that in the list of rows, not in the table.
        """
        before = rows_of(self.original(), self.lora.spec.rows)
        before = before.to(widest_dtype(before.device)).nan_to_num(0.0, 0.0, 0.0)
        change = full_tensor((stored or self.stored())[ROWS]).to(before) - before
        parts = torch.split(change, TOGETHER)
        return [LowRankBlock(i * TOGETHER, 0, torch.eye(len(part)).to(part), part) for i, part in enumerate(parts)]

    def tie_again_(self, module: nn.Module, before: Mapping[str, nn.Parameter | None], *, loaded: bool) -> None:
        """Tie the tables again: all of them get the first table's parameters. In place.

        After a load, a table whose loaded values differ keeps its own parameter, as torch's own tied modules do. After
        a move, only the rows are tied again.
        """
        if not loaded:
            module._parameters[ROWS] = self.rows
            return
        for name in (WEIGHT, ROWS):
            old, new = before.get(name), module._parameters.get(name)
            tied = [table for table in self.tables if table is not module and table._parameters.get(name) is old]
            if new is old or new is None or old is None or not tied:
                continue
            if module is self.tables[0]:
                for table in tied:
                    table._parameters[name] = new
            elif is_sharded(new) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                continue
            elif new.is_meta or bool(((new == old) | (new.isnan() & old.isnan())).all()):
                module._parameters[name] = old

    def dense_weight(self, weight: torch.Tensor) -> torch.Tensor:
        self.record_segment()
        table = self.tables[0]
        if not self.lora.strength:
            return weight
        self.refuse_computed_weight()
        return weight.index_copy(0, table.row_ids(weight.device), self.rows.to(weight.dtype))


class LoRATable(AdaptedModule):
    """A table with some trained rows."""

    ATTRIBUTES = ("lora_table", "lora_custom_forward", "lora_row_ids")
    FORWARDS: ClassVar[str] = "torch.nn.modules."  # forward_with_rows replaces forwards from these modules only
    weight: nn.Parameter
    lora_rows: nn.Parameter
    lora_table: TokenRows
    lora_custom_forward: bool
    lora_row_ids: torch.Tensor  # spec.rows; not a buffer, because weight averaging would average it

    def lora_adapters(self) -> Mapping[str, AdaptedWeights]:
        return {"": self.lora_table}

    def row_ids(self, device: torch.device) -> torch.Tensor:
        """Return the row numbers as an int64 tensor (n,) on a device."""
        if self.lora_row_ids.device != device:
            with torch.inference_mode(False):
                self.lora_row_ids = torch.tensor(self.lora_table.lora.spec.rows, device=device)
        return self.lora_row_ids

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.lora_table.check_strengths()
        if not self.lora_table.lora_active or not self.lora_table.lora.strength:
            return super().forward(*args, **kwargs)
        nested = any(getattr(each, "is_nested", False) for each in (*args, *kwargs.values()))  # they have few operators
        if self.lora_custom_forward or nested:
            with StandIns(self, [self.lora_table]):
                return super().forward(*args, **kwargs)
        self.lora_table.record_segment()
        return self.forward_with_rows(*args, **kwargs)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that the table had before it was adapted, without the trained rows."""
        return super().forward(*args, **kwargs)

    def forward_with_rows(self, input: torch.Tensor) -> torch.Tensor:
        """Run the table's forward with the trained rows in place of W's rows.

        The trained rows are part of the graph even if the input selects none of them.
        """
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if is_sharded(param):  # by parallelize_module; fully_shard does not come here
            raise LoRAError(
                f"{type(self).__name__}: trained rows do not follow a tensor parallel split; leave the table out of "
                "trainable_token_indices, or out of the parallelize plan."
            )
        super().register_parameter(name, param)


class LoRAEmbeddingTable(LoRATable):
    """nn.Embedding: weight (num, dim)."""

    def forward_with_rows(self, input: torch.Tensor) -> torch.Tensor:
        base = cast(torch.Tensor, self.base_forward(input))
        ids = self.row_ids(input.device).to(input.dtype)
        positions = torch.searchsorted(ids, input.contiguous()).clamp(max=len(ids) - 1)
        # padding_idx among the trained rows: torch gives that row no gradient.
        padding, numbers = cast(nn.Embedding, self).padding_idx, self.lora_table.lora.spec.rows
        position = None if padding is None or padding not in numbers else numbers.index(padding)
        rows = F.embedding(positions, self.lora_rows.to(base.dtype), position)
        return torch.where((ids[positions] == input).unsqueeze(-1), rows, base)


class LoRAHead(LoRATable):
    """nn.Linear as an output head: weight (num, dim)."""

    def forward_with_rows(self, input: torch.Tensor) -> torch.Tensor:
        base = cast(torch.Tensor, self.base_forward(input))
        ids, bias = self.row_ids(input.device), cast(nn.Linear, self).bias
        rows = self.lora_rows.to(self.weight.dtype)
        put = torch.index_copy if runs_by_formula(base) else torch.Tensor.index_copy_
        return put(base, -1, ids, F.linear(input, rows, None if bias is None else bias[ids]))


TABLES: dict[type[nn.Module], type[LoRATable]] = {nn.Embedding: LoRAEmbeddingTable, nn.Linear: LoRAHead}


def is_table(module: nn.Module) -> bool:
    """Return whether single rows of a module can be trained."""
    return isinstance(module, tuple(TABLES))


def adapt_table_(module: nn.Module, name: str, spec: LayerSpec, injection: object) -> TokenRows:
    """Turn a module into a table with trained rows spec.rows. Its parameter is created later. In place."""
    adapter = TokenRows(LayerState(spec, name, injection))
    share_table_(module, adapter)
    return adapter


def share_table_(module: nn.Module, adapter: TokenRows) -> None:
    """Add a module to the tables of an adapter. All of them are tied. In place."""
    mixin = next(mixin for kind, mixin in TABLES.items() if isinstance(module, kind))
    custom_forward = not type(module).forward.__module__.startswith(LoRATable.FORWARDS)
    ids = torch.tensor(adapter.lora.spec.rows)
    vars(module).update(lora_table=adapter, lora_custom_forward=custom_forward, lora_row_ids=ids)  # first, as in adapt_
    table = cast(LoRATable, module)
    adapter.tables.append(table)
    module.__class__ = swapped_class(mixin, type(module))
    if ROWS in adapter.tables[0]._parameters:
        table.register_parameter(ROWS, adapter.rows)


def table_adapters(modules: Iterable[nn.Module]) -> dict[int, TokenRows]:
    """Return the adapters of the tables among these modules, by the id of the table's weight."""
    return {id(module.weight): module.lora_table for module in modules if isinstance(module, LoRATable)}
