"""What each tensor of a merged file must be, from base and adapter alone, and the comparison with what was written.

    expected = m / norm(W + s * B @ A) * (W + s * B @ A), in float64

W is the base's, or the adapter's own where it holds the weight whole, and trained rows take their place in it. The
scale in front is there where the adapter's variant gives outputs a length m. Neither the plan that wrote the result nor
the arithmetic of nn/exact_merge.py is used, and of LoRA, its starts and DoRA nothing of the variant's class either, so
that a mistake in these is found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_lora.adapter.adapter import Adapter
from lightning_lora.command.merge import fit_to_base, merge_on_disk
from lightning_lora.files.weights import Weights, open_weights
from lightning_lora.formats.sources import adapter_with_options
from lightning_lora.nn.low_rank import (
    IN_PROJ,
    MERGEABLE_DTYPES,
    TRANSPOSED,
    TRANSPOSED_EXPERTS,
)
from lightning_lora.nn.variant import Variant

PathLike = str | Path
Factors = tuple[torch.Tensor, torch.Tensor]  # left (m, k) and right (k, n); of a stack (E, m, k) and (E, k, n)


class Meaning(NamedTuple):
    """W' = W + s * (sum of b @ a over the pairs). If lengths are given, each output is then scaled to that norm."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # (a, b), float64, in the shapes that nn/low_rank.py states
    lengths: torch.Tensor | None = None  # (out,)
    rounded: bool = False  # merging computes the pairs from the stored tensors, and rounds them to float32 or better


def meaning(variant: Variant, stored: Mapping[str, torch.Tensor]) -> Meaning:
    """Say what a layer's tensors mean; of variants that are not named here, as `effective_factors` says it."""
    wide = {leaf.removeprefix("lora_"): value.detach().double() for leaf, value in stored.items()}
    if wide.keys() == {"A", "B"}:
        return Meaning([(wide["A"], wide["B"])])
    if wide.keys() == {"A", "B", "start_A", "start_B"}:
        return Meaning([(wide["A"], wide["B"]), (wide["start_A"], -wide["start_B"])], rounded=True)
    if wide.keys() == {"A", "B", "magnitude"}:
        return Meaning([(wide["A"], wide["B"])], lengths=stored["lora_magnitude"].detach())
    a, b, _ = variant.effective_factors_exactly(
        {leaf: value.detach().double() for leaf, value in stored.items()}, None, 1.0
    )
    return Meaning([(a, b)], rounded=True)


@dataclass
class ExpectedWeight:
    """One tensor that an adapter changes.

    Attributes:
        base: W in the base.
        dtype: of the result.
        whole: what takes W's place, or None.
        rows: the numbers of trained rows.
        row_values: (len(rows), columns).
        factors: what is added, s included, in float64.
        lengths: the length of each output's weights, or None.
        scale_of: returns the scale of each output for a W (out, in), where a variant has one and gives no lengths.
        transposed: W is stored (in, out).
        arithmetic: the dtype in which the factors that were added, or sums, were rounded.
        scale: what scale_of returned, once it was called.
    """

    base: torch.Tensor
    dtype: torch.dtype
    whole: torch.Tensor | None = None
    rows: Sequence[int] = ()
    row_values: torch.Tensor | None = None
    factors: list[Factors] = field(default_factory=list)
    lengths: torch.Tensor | None = None
    scale_of: Callable[[torch.Tensor], torch.Tensor | None] | None = None
    transposed: bool = False
    arithmetic: torch.dtype = torch.float64
    scale: torch.Tensor | None = None

    def exact(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W as the adapter has it, in a dtype."""
        return (self.base if self.whole is None else self.whole.detach()).to(dtype)

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the result in float64, and for each element the sum of all that took part in it, unsigned."""
        exact, total = self._unscaled()
        if not exact.dim():
            return exact, total
        if self.lengths is None:
            scale = self._scale_of_weight()
            return (exact, total) if scale is None else self._scaled(exact, total, scale)
        norms = exact.square().sum(0).sqrt() if self.transposed else exact.flatten(1).square().sum(1).sqrt()
        return self._scaled(exact, total, self._scale(norms))

    def _scaled(
        self, exact: torch.Tensor, total: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = scale.view([1, -1] if self.transposed else [-1] + [1] * (exact.dim() - 1))
        return exact * scale, total * scale.abs()

    def _unscaled(self) -> tuple[torch.Tensor, torch.Tensor]:
        exact = self._with_rows()
        total = exact.abs()
        for left, right in self.factors:
            exact += (left @ right).view(exact.shape)
            total += (left.abs() @ right.abs()).view(exact.shape)
        return exact, total

    def _with_rows(self) -> torch.Tensor:
        """Return W in float64, trained rows in their place."""
        exact = self.exact(torch.promote_types(self.base.dtype, self.dtype)).double().clone()
        for place, row in enumerate(self.rows):
            if self.row_values is not None:
                exact[row] = self.row_values[place].double()
        return exact

    def _scale(self, norms: torch.Tensor) -> torch.Tensor:
        """Return m / norm, 1 for an output without weights. The dtype of m is that of both, as in a live layer."""
        assert self.lengths is not None
        norms = norms.to(self.lengths.dtype)
        return torch.where(norms == 0, 1.0, self.lengths / norms).double()

    def _scale_of_weight(self) -> torch.Tensor | None:
        if self.scale_of is not None and self.scale is None:
            weight = self._with_rows().flatten(1)
            scale = self.scale_of(weight.T if self.transposed else weight)
            self.scale = None if scale is None else scale.double()
        return self.scale


class ExpectedWeights:
    """What an adapter makes of each tensor of a base, by the tensor's name in the base's files."""

    def __init__(self, adapter: Adapter, base: Weights, files: Mapping[str, str]) -> None:
        """Take an adapter and a base under the same names; `files` are the names in the base's files, by these."""
        self.adapter, self.base = adapter, base
        self.names = {in_file: name for name, in_file in files.items()}
        self.layers, self.whole, self.rows = set(adapter.layers), adapter.whole_tensors(), adapter.rows()
        # Each with the table that its rows are from: of a tie, from the first end.
        self.tables = {**{table: table for table in adapter.tables}, **adapter.tied}
        self.tied = base.tied()
        self.found: set[str] = set()  # layers, tables and tensors of the adapter that the base has

    def of(self, name_in_file: str, dtype: torch.dtype) -> ExpectedWeight | None:
        """Return what a tensor of the result must be, or None where the adapter does not change it."""
        name = self.names[name_in_file]
        module, _, leaf = name.rpartition(".")
        is_weight = leaf in ("weight", IN_PROJ)
        layer = name if name in self.layers else module if is_weight and module in self.layers else None
        table = self._table_of(name)
        if name not in self.whole and table is None and layer is None:
            return None
        self.found |= {name} if layer is None else {name, layer}
        expected = ExpectedWeight(self.base.tensors[name], dtype, self.whole.get(name))
        if table is not None:
            self.found.add(table)
            expected.rows, expected.row_values = self.adapter.tables[table], self.rows[table]
        if layer is not None:
            self._add_factors(expected, layer)
        return expected

    def check_all_found(self) -> None:
        """Fail for the first part of the adapter that no tensor of the base has taken up."""
        whole = [value for name, value in self.whole.items() if name in self.found and isinstance(value, torch.Tensor)]
        lost = [
            *sorted(self.layers - self.found),
            *sorted({self.tables.get(table, table) for table in self.rows} - self.found),
            *(n for n, v in self.whole.items() if n not in self.found and not any(torch.equal(v, w) for w in whole)),
        ]
        assert not lost, f"{lost[0]!r} of the adapter is in no tensor of the result"

    def _table_of(self, name: str) -> str | None:
        """Return the table whose trained rows a tensor has: its own, or those of the other end of a tie."""
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self.tables:
            return self.tables[module]
        if self.base.folder is None:
            return None
        return next(
            (first for table, first in self.tables.items() if f"{table}.weight" in self.tied.get(name, ())), None
        )

    def _add_factors(self, expected: ExpectedWeight, layer: str) -> None:
        variant, stored, scaling = self.adapter.variant, self.adapter.stored(layer), self.adapter.scaling(layer)
        meant = meaning(variant, stored)
        for a, b in meant.pairs:
            left, right, expected.transposed = self._placed(layer, expected.base.shape, a, b)
            expected.factors.append((left * scaling, right))
        expected.arithmetic = torch.float32 if meant.rounded else torch.float64
        expected.lengths = meant.lengths
        if variant.has_scale and meant.lengths is None:
            double = {name: value.detach().double() for name, value in stored.items()}
            expected.scale_of = lambda weight: variant.effective_factors_exactly(double, weight, scaling)[2]

    def _placed(
        self, layer: str, shape: Sequence[int], a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return the left and right whose product lies in a weight of this shape, and whether they are turned."""
        kind, rank = self.adapter.layers[layer].kind or None, b.shape[1]
        parts = self.adapter.layers[layer].parts
        if self.adapter.is_parameter(layer) and len(shape) == 3:
            a, b = a.view(shape[0], rank, -1), b.view(shape[0], -1, rank)
            turned = (b.shape[1], a.shape[2]) != tuple(shape[1:]) if kind is None else kind == TRANSPOSED_EXPERTS
            return (a.mT, b.mT, turned) if turned else (b, a, turned)
        if parts is not None:
            height = b.shape[0] // sum(parts)
            wide = b.new_zeros(height * len(parts), rank * sum(parts))
            for place, part in enumerate(i for i, enabled in enumerate(parts) if enabled):
                here = b[place * height : (place + 1) * height]
                wide[part * height : (part + 1) * height, place * rank : (place + 1) * rank] = here
            b = wide
        a, b = a.flatten(1), b.flatten(1)
        fitting = (b.shape[0], a.shape[1]) == tuple(shape) or len(shape) > 2
        turned = kind in TRANSPOSED
        if kind is None:
            turned = not fitting or (self.adapter.fan_in_fan_out and len(shape) == 2 and shape[0] == shape[1])
        return (a.T, b.T, turned) if turned else (b, a, turned)


def merge_and_check(base: PathLike, adapter: PathLike, output: PathLike, **options: Any) -> list[Path]:
    """Merge as merge_on_disk does, and check each tensor of the result."""
    left_out = merge_on_disk(base, adapter, output, **options)
    names = ("dtype", "lora_alpha", "strict_base")
    check_merged(base, adapter, output, **{name: options[name] for name in names if name in options})
    return left_out


def check_merge_command(*arguments: object) -> None:
    """Check what `lightning-lora merge` wrote with these arguments."""
    parser = argparse.ArgumentParser()
    for name in ("base", "adapter", "output", "dtype", "strict-base", "lora-alpha"):
        parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args([str(argument) for argument in arguments])
    check_merged(
        given.base,
        given.adapter,
        given.output,
        dtype=getattr(torch, given.dtype) if given.dtype else None,
        lora_alpha=float(given.lora_alpha) if given.lora_alpha else None,
        strict_base=given.strict_base != "false",
    )


def check_merged(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
    strict_base: bool = True,
) -> None:
    """Compare every tensor of a merged file or folder with base and adapter; arguments are those of merge_on_disk."""
    weights, result = open_weights(base), open_weights(output)
    source = adapter_with_options(adapter, lora_alpha)
    fitted = fit_to_base(source, weights, strict_base=strict_base)
    expected = ExpectedWeights(fitted.adapter, fitted.base, fitted.files)
    assert result.tensors.keys() == weights.tensors.keys()
    for name, before in weights.tensors.items():
        after = result.tensors[name]
        wanted = dtype if dtype is not None and before.dtype in MERGEABLE_DTYPES else before.dtype
        whole = fitted.adapter.tensors.get(name)  # it takes the place of the base's tensor, whatever shape that has
        assert (after.dtype, after.shape) == (wanted, before.shape if whole is None else whole.shape), name
        if whole is not None and after.shape != before.shape:
            expected.of(name, wanted)  # is found
            assert torch.equal(_bits(after), _bits(whole.to(wanted))), name
        else:
            _compare(name, before, after, expected.of(name, wanted))
    expected.check_all_found()


def _compare(name: str, old: torch.Tensor, new: torch.Tensor, expected: ExpectedWeight | None) -> None:
    if expected is None and old.dtype == new.dtype:
        same = torch.equal(_bits(old), _bits(new))
    elif expected is None:
        same = _is_close(new, old.double(), old.double().abs())
    elif not old.is_floating_point():
        same = torch.equal(expected.exact(old.dtype), new)
    else:
        same = _is_close(new, *expected.values(), expected.arithmetic)
    assert same, f"{name!r} differs from what base and adapter give"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _is_close(
    new: torch.Tensor, exact: torch.Tensor, total: torch.Tensor, arithmetic: torch.dtype = torch.float64
) -> bool:
    """Return whether values agree to half a unit in the dtype's last place, plus the rounding of the arithmetic.

    Args:
        new: the values.
        exact: what they should be, in float64.
        total: the sum of the absolute values of all terms, which bounds the rounding.
        arithmetic: what a float64 result was computed in. Others were computed in float32 or better.
    """
    info = torch.finfo(new.dtype)
    rounding = torch.finfo(arithmetic if new.dtype == torch.float64 else torch.float32).eps * 8
    allowed = exact.abs() * (info.eps / 2 * 1.001) + total * rounding + info.tiny * info.eps
    actual = new.double()
    return bool((((actual - exact).abs() <= allowed) | (actual == exact) | (actual.isnan() & exact.isnan())).all())
