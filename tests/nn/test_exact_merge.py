"""The merge arithmetic: bit-exact in any layout, all or nothing, rounded once, with little memory beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora import LoRAError
from lightning_lora.nn import exact_merge
from lightning_lora.nn.exact_merge import (
    Buffers,
    Undo,
    merge_weight_,
    merged_weight,
    restored_weight,
    unmerge_weight_,
)
from lightning_lora.nn.low_rank import LowRankBlock
from support.covering import covering
from support.models.layers import (
    DTYPES,
    SHARES,
    assert_rounded_sum,
    exact_delta,
    make_pieces,
    make_weight,
    same_bits,
    scaling_for,
)
from support.runs.broken_off import break_off


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cycles_with_changing_factors_restore_every_bit_where_subtracting_drifts(
    dtype: torch.dtype, share: float
) -> None:
    weight = torch.nn.Parameter(make_weight((30, 40), dtype))
    before, address, pieces = weight.detach().clone(), weight.data_ptr(), make_pieces(weight)
    delta = exact_delta(pieces, scaling_for(before, pieces, share), before.shape).to(dtype)
    assert not same_bits(before.clone().add_(delta).sub_(delta), before)
    for _ in range(20):
        pieces = make_pieces(weight)
        kept = merge_weight_(weight, pieces, scaling_for(before, pieces, share))
        assert not same_bits(weight, before)
        for piece in pieces:  # what training does to A and B in the meantime
            piece.left.mul_(-3)
            piece.right.add_(1)
        unmerge_weight_(weight, kept)
        assert same_bits(weight, before)
    assert weight.data_ptr() == address


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_one_bit_of_a_copied_weight_is_an_error_and_undone(dtype: torch.dtype) -> None:
    weight = make_weight((300, 40), dtype)
    before, pieces = weight.clone(), make_pieces(weight)
    kept = merge_weight_(weight, pieces, 0.01, copies=Buffers())
    weight.view(torch.uint8)[299, 0] ^= 1  # the lowest bit of one value, which no sum of the values would show
    with pytest.raises(LoRAError, match="was changed while it was merged; the change was undone"):
        unmerge_weight_(weight, kept)
    assert same_bits(weight, before)


@pytest.mark.parametrize(
    ("moved", "dtype", "copy"), covering(["unaligned", "transposed"], DTYPES, [False, True], meet=1)
)
def test_memory_that_was_exchanged_with_the_same_values_is_no_edit(moved: str, dtype: torch.dtype, copy: bool) -> None:
    """A strategy may put a weight into other memory meanwhile, which whole words do not fit."""
    weight = make_weight((30, 40), dtype)
    before, pieces = weight.clone(), make_pieces(weight)
    kept = merge_weight_(weight, pieces, 0.01, copies=Buffers() if copy else None)
    if moved == "unaligned":
        weight.data = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)
    else:
        weight.data = weight.t().contiguous().t()
    unmerge_weight_(weight, kept)
    assert same_bits(weight, before)


@pytest.mark.core
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("copy", [False, True])
def test_restored_weight_is_the_base_and_leaves_the_merge_alone(copy: bool) -> None:
    weight = make_weight((30, 40), torch.bfloat16)
    before, pieces = weight.clone(), make_pieces(weight)
    kept = merge_weight_(weight, pieces, 0.0005, copies=Buffers() if copy else None)
    merged = weight.clone()
    for _ in range(2):
        original = restored_weight(weight, kept)
        assert same_bits(original, before)
        assert same_bits(weight, merged)
        original.zero_()
    unmerge_weight_(weight, kept)
    assert same_bits(weight, before)


def test_a_weight_of_which_few_rows_change_is_not_copied() -> None:
    weight = make_weight((100, 40), torch.bfloat16)
    before = weight.clone()
    pieces = [LowRankBlock(row, 0, torch.randn(rows, 3), torch.randn(3, 40)) for row, rows in ((20, 10), (90, 10))]
    kept = merge_weight_(weight, pieces, 1.0, copies=Buffers())
    assert kept.nbytes() <= before[:20].nbytes
    assert_rounded_sum(weight, before, pieces, 1.0)
    assert same_bits(restored_weight(weight, kept), before)
    unmerge_weight_(weight, kept)
    assert same_bits(weight, before)


LAYOUTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "transposed": lambda dtype: make_weight((24, 18), dtype).t(),
    "strided": lambda dtype: make_weight((40, 60), dtype)[::2, 1::3],
    "offset": lambda dtype: make_weight((33, 21), dtype)[1:],  # not where a word of eight bytes starts
    "convolution": lambda dtype: make_weight((12, 6, 3, 3), dtype),
    "channels_last": lambda dtype: make_weight((12, 6, 3, 3), dtype).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda dtype: make_weight((8, 4, 2, 3, 2), dtype).to(memory_format=torch.channels_last_3d),
    "one_element": lambda dtype: make_weight((1, 1), dtype),
    "odd_bytes": lambda dtype: make_weight((3, 5), dtype),
}


@pytest.mark.core
@pytest.mark.parametrize(
    ("layout", "dtype", "block", "copy"), covering([*LAYOUTS], DTYPES, [1, 16, 54, 55, 10**6], [False, True])
)
def test_merge_in_any_layout_and_block_size_is_exact_and_undone(
    layout: str, dtype: torch.dtype, block: int, copy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one row longer than a block, of several rows, with a rest, and one block for all."""
    monkeypatch.setattr("lightning_lora.nn.exact_merge.CPU_CHUNK", block)
    weight = LAYOUTS[layout](dtype)
    before, strides, pieces = weight.clone(), weight.stride(), make_pieces(weight, r=2)
    scaling = scaling_for(weight, pieces, 0.05)
    kept = merge_weight_(weight, pieces, scaling, copies=Buffers() if copy else None)
    assert_rounded_sum(weight, before, pieces, scaling)
    assert same_bits(merged_weight(before, pieces, scaling), weight)
    assert same_bits(restored_weight(weight, kept), before)
    unmerge_weight_(weight, kept)
    assert same_bits(weight, before)
    assert weight.stride() == strides


def test_a_slice_of_a_bigger_tensor_leaves_the_rest_alone() -> None:
    whole = make_weight((40, 60), torch.bfloat16)
    before = whole.clone()
    kept = merge_weight_(whole[::2, 1::3], make_pieces(whole[::2, 1::3]), 1.0)
    others = torch.ones_like(whole, dtype=torch.bool)
    others[::2, 1::3] = False
    assert torch.equal(whole[others], before[others])
    unmerge_weight_(whole[::2, 1::3], kept)
    assert same_bits(whole, before)


@pytest.mark.core
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_pieces_change_their_own_parts_only(dtype: torch.dtype) -> None:
    weight = make_weight((30, 50), dtype)
    before = weight.clone()
    pieces = [
        LowRankBlock(0, 0, torch.randn(10, 3), torch.randn(3, 50)),
        LowRankBlock(20, 0, torch.randn(10, 2), torch.randn(2, 25)),
        LowRankBlock(20, 30, torch.randn(10, 4), torch.randn(4, 20)),
    ]
    kept = merge_weight_(weight, pieces, 0.01)
    assert_rounded_sum(weight, before, pieces, 0.01)
    assert same_bits(weight[10:20], before[10:20])
    assert same_bits(weight[20:, 25:30].clone(), before[20:, 25:30].clone())
    assert same_bits(merged_weight(before, pieces, 0.01), weight)
    unmerge_weight_(weight, kept)
    assert same_bits(weight, before)


@st.composite
def merges(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    factors = draw(st.sampled_from(DTYPES))
    r, columns = draw(st.integers(1, 12)), math.prod(shape[1:])
    magnitude = draw(st.sampled_from([1e-7, 1e-3, 1.0, 100.0]))
    return {
        "weight": (magnitude * torch.randn(shape, generator=generator)).to(dtype),
        "left": torch.randn(shape[0], r, generator=generator).to(factors),
        "right": torch.randn(r, columns, generator=generator).to(factors),
        "scaling": draw(st.floats(-10, 10)),
        "block": draw(st.integers(1, 200)),
        "copy": draw(st.booleans()),
    }


@settings(max_examples=80)
@given(merges())
def test_any_merge_is_nearest_and_comes_back(case: dict[str, Any]) -> None:
    weight, pieces = case["weight"].clone(), [LowRankBlock(0, 0, case["left"], case["right"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_lora.nn.exact_merge.CPU_CHUNK", case["block"])
        kept = merge_weight_(weight, pieces, case["scaling"], copies=Buffers() if case["copy"] else None)
        assert same_bits(weight, merged_weight(case["weight"], pieces, case["scaling"]))
        assert_rounded_sum(weight, case["weight"], pieces, case["scaling"])
        unmerge_weight_(weight, kept)
    assert same_bits(weight, case["weight"])


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(["values", "copies", "a chunk copied whole"]),
    st.integers(0, 1199),
    st.floats(-2, 2),
    st.integers(0, 2**16),
)
def test_a_weight_changed_while_merged_is_an_error_however_it_is_kept(
    dtype: torch.dtype, way: str, place: int, change: float, seed: int
) -> None:
    """Whatever bits one value got in the meantime, also where unmerging writes over them."""
    torch.manual_seed(seed)
    weight = make_weight((30, 40), dtype)
    before, pieces = weight.clone(), make_pieces(weight)
    scaling = scaling_for(weight, pieces, 30.0 if way == "a chunk copied whole" else 0.01)
    kept = merge_weight_(weight, pieces, scaling, copies=Buffers() if way == "copies" else None)
    merged = weight.clone()
    weight.view(-1)[place] += change
    if same_bits(weight, merged):
        unmerge_weight_(weight, kept)
        assert same_bits(weight, before)
        return
    with pytest.raises(LoRAError, match="changed while it was merged"):
        unmerge_weight_(weight, kept)
    assert kept.lost != same_bits(weight, before)
    assert not (kept.lost and way != "values")


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_step_while_merged_is_an_error(dtype: torch.dtype) -> None:
    weight = make_weight((30, 40), dtype)
    before, pieces = weight.clone(), make_pieces(weight)
    kept = merge_weight_(weight, pieces, scaling_for(weight, pieces, 0.01))
    weight -= 0.01 * torch.randn(30, 40).to(dtype)
    for _ in range(2):  # looking does not hide it
        with pytest.raises(LoRAError, match="changed while it was merged"):
            restored_weight(weight, kept)
    with pytest.raises(LoRAError, match="Load the base weights again"):
        unmerge_weight_(weight, kept)
    assert not same_bits(weight, before)


def poisoned(kind: str, weight: torch.Tensor) -> list[LowRankBlock]:
    """An adapter or a weight whose last row, far from the first block, makes a sum that is not finite."""
    pieces = make_pieces(weight)
    if kind == "weight":
        weight[-1, 3] = math.inf
    elif kind == "overflow":
        large = 1e4 if weight.dtype == torch.float16 else 1e30  # finite, but its square is not in the weight's dtype
        pieces[0].left[-1, 0] = pieces[0].right[0, -1] = large
    else:
        pieces[0].left[-1] = float(kind)
    return pieces


@pytest.mark.core
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("dtype", "kind", "copy"),
    covering(
        [torch.float32, torch.bfloat16, torch.float16],
        ["nan", "inf", "-inf", "overflow", "weight"],
        [False, True],
        meet=1,
    ),
)
def test_what_is_not_finite_is_refused_and_leaves_every_bit(dtype: torch.dtype, kind: str, copy: bool) -> None:
    weight = make_weight((30, 40), dtype)
    pieces, before = poisoned(kind, weight), weight.clone()
    with pytest.raises(LoRAError, match="not finite"):
        merge_weight_(weight, pieces, 0.5, copies=Buffers() if copy else None)
    assert same_bits(weight, before)
    with pytest.raises(LoRAError, match="not finite"):
        merged_weight(weight, pieces, 0.5)
    assert same_bits(weight, before)


def test_merge_of_finite_values_whose_sum_overflows_is_undone() -> None:
    weight = torch.full((4, 4), torch.finfo(torch.float64).max / 2, dtype=torch.float64)
    before = weight.clone()
    unmerge_weight_(weight, merge_weight_(weight, make_pieces(weight), 1.0))
    assert same_bits(weight, before)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("copy", [False, True])
def test_merge_that_fails_in_the_middle_leaves_every_bit(copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight((30, 40), torch.bfloat16)
    before, calls = weight.clone(), []

    def fail_at_the_third(weight: torch.Tensor, part: LowRankBlock, original: Any = exact_merge._window) -> Any:
        calls.append(not same_bits(weight, before))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(weight, part)

    monkeypatch.setattr(exact_merge, "_window", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        merge_weight_(weight, make_pieces(weight), 0.01, copies=Buffers() if copy else None)
    assert calls[2]  # something was written
    assert same_bits(weight, before)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore:Exception ignored in")  # a generator that was broken off
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copy", [False, True])
def test_a_call_broken_off_before_any_line_is_completed_by_unmerging(dtype: torch.dtype, copy: bool) -> None:
    """A second exception, one line later, breaks off what a merge does after the first."""
    weight = make_weight((16, 40), dtype)
    before, pieces, copies = weight.clone(), make_pieces(weight), Buffers() if copy else None
    for line in range(1000):
        merging, unmerging = Undo(), Undo()
        reached = break_off(partial(merge_weight_, weight, pieces, 1e-5, copies=copies, undo=merging), line, line + 1)
        unmerge_weight_(weight, merging)
        assert same_bits(weight, before), line
        merge_weight_(weight, pieces, 1e-5, copies=copies, undo=unmerging)
        reached |= break_off(partial(unmerge_weight_, weight, unmerging), line)
        unmerge_weight_(weight, unmerging)
        assert same_bits(weight, before), line
        if not reached:
            break
    assert 50 < line < 999


def test_float64_agrees_with_rational_arithmetic() -> None:
    weight = make_weight((8, 8), torch.float64)
    left, right = torch.randn(8, 4, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    merged = merged_weight(weight, [LowRankBlock(0, 0, left, right)], 0.7)
    for i in range(8):
        for j in range(8):
            products = [
                Fraction(0.7) * Fraction(b) * Fraction(a)
                for b, a in zip(left[i].tolist(), right[:, j].tolist(), strict=True)
            ]
            wanted = Fraction(weight[i, j].item()) + sum(products)
            terms = abs(Fraction(weight[i, j].item())) + sum(map(abs, products))
            assert abs(Fraction(merged[i, j].item()) - wanted) <= 4 * Fraction(torch.finfo(torch.float64).eps) * terms


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("way", ["values", "copies", "new"])
def test_the_cost_of_rounding_is_that_of_float64(way: str) -> None:
    weight = make_weight((30, 40), torch.bfloat16)
    before, pieces, cost = weight.clone(), make_pieces(weight), [0.0, 0.0]
    delta = exact_delta(pieces, 0.01, weight.shape)
    if way == "new":
        weight = merged_weight(weight, pieces, 0.01, cost=cost)
    else:
        merge_weight_(weight, pieces, 0.01, copies=Buffers() if way == "copies" else None, cost=cost)
    error = weight.double() - (before.double() + delta)
    assert cost == pytest.approx([float(error.norm()) ** 2, float(delta.norm()) ** 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_of_a_one_per_cent_adapter_keeps_less_than_a_tenth_and_none_keeps_more_than_a_copy(
    dtype: torch.dtype,
) -> None:
    for share, most in ((0.01, 0.1), (0.3, 1.0), (30.0, 1.0)):
        weight = (0.02 * torch.randn(512, 512)).to(dtype)
        pieces = make_pieces(weight, r=8)
        kept = merge_weight_(weight, pieces, scaling_for(weight, pieces, share))
        assert 0 < kept.nbytes() <= most * weight.nbytes
