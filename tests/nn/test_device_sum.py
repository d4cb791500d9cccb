"""The arithmetic of a merge on a device: rounded once, in float32 for 16 bits, in stacks as one weight by itself."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lora.nn.device_sum import DeviceSum
from lightning_lora.nn.low_rank import LowRankBlock, row_blocks
from support.layers import DTYPES, exact_delta, make_pieces, make_weight, nearest, same_bits, scaling_for

HALF = [torch.bfloat16, torch.float16]
# In float16, 6 in 100,000 are rounded otherwise: so many values that no draw comes near the limit.
SIZES = {torch.float16: (1024, 1200)}
SHARES = (0.001, 0.01, 0.1, 1.0, 30.0)  # the adapter's norm over the weight's


def rounded(weight: torch.Tensor, blocks: list[LowRankBlock], scaling: float) -> torch.Tensor:
    """W' of one weight."""
    summed = DeviceSum(blocks, scaling, weight.dtype)
    return summed.rounded(weight.unsqueeze(0), torch.empty_like(weight).unsqueeze(0))[0]


@pytest.mark.parametrize("r", [4, 16, 17, 128])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_all_but_one_in_ten_thousand_are_the_nearest_values(dtype: torch.dtype, share: float, r: int) -> None:
    rows, columns = SIZES.get(dtype, (512, 600))
    weight = (0.02 * torch.randn(rows, columns)).to(dtype)
    pieces = make_pieces(weight, r)
    scaling = scaling_for(weight, pieces, share)  # no power of two: it is rounded too
    assert math.frexp(scaling)[0] != 0.5
    wanted = weight.double() + exact_delta(pieces, scaling, weight.shape)
    assert nearest(rounded(weight, pieces, scaling), wanted).double().mean() >= 0.9999


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("side", [0, 1])
def test_all_but_one_in_ten_thousand_are_the_nearest_values_with_a_scale(
    dtype: torch.dtype, share: float, side: int
) -> None:
    rows, columns = SIZES.get(dtype, (512, 600))
    weight = (0.02 * torch.randn(rows, columns)).to(dtype)
    (piece,) = make_pieces(weight, 8)
    scaling = scaling_for(weight, [piece], share)
    scale = 1 + 0.3 * torch.randn(rows, 1) if side == 0 else 1 + 0.3 * torch.randn(1, columns)
    wanted = scale.double() * (weight.double() + exact_delta([piece], scaling, weight.shape))
    found = rounded(weight, [piece._replace(scale=scale)], scaling)
    assert nearest(found, wanted).double().mean() >= 0.9999


@pytest.mark.parametrize("dtype", HALF)
def test_a_product_in_one_float32_would_round_too_many_values_wrongly(dtype: torch.dtype) -> None:
    """The cases above are ones in which the split of the factors is needed."""
    weight = (0.02 * torch.randn(512, 600)).to(dtype)
    pieces = make_pieces(weight, 128)
    scaling = scaling_for(weight, pieces, 1.0)
    wanted = weight.double() + exact_delta(pieces, scaling, weight.shape)
    delta = (pieces[0].left.float() * scaling) @ pieces[0].right.float()
    assert nearest((weight.float() + delta).to(dtype), wanted).double().mean() < 0.9999


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_holds_what_each_weight_gives_by_itself(dtype: torch.dtype, scaled: bool) -> None:
    weights = [make_weight((30, 40), dtype) for _ in range(3)]
    blocks = [make_pieces(weight)[0] for weight in weights]
    if scaled:
        blocks = [block._replace(scale=1 + torch.rand(30, 1)) for block in blocks]
    summed, stack = DeviceSum(blocks, 0.3, dtype), torch.stack(weights)
    together = summed.rounded(stack, torch.empty_like(stack))
    for weight, block, found in zip(weights, blocks, together, strict=True):
        torch.testing.assert_close(found, rounded(weight, [block], 0.3))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_replaced_rows_hold_the_new_values_to_the_bit(dtype: torch.dtype) -> None:
    """Where the new values are 10,000 times smaller, and where the old ones were not finite."""
    table, rows = (1 + torch.rand(60, 40)).to(dtype), (1e-4 * (1 + torch.rand(20, 40))).to(dtype)
    table[3] = math.inf
    ids = [1, 2, 3, *range(20, 37)]
    for block in row_blocks(table, ids, rows):
        window = table[block.row : block.row + len(block.left)]
        window.copy_(rounded(window, [block], 1.0))
    assert same_bits(table[ids], rows)


@pytest.mark.parametrize("dtype", HALF)
def test_sixteen_bits_are_summed_in_float32_and_more_bits_in_float64(dtype: torch.dtype) -> None:
    pieces = make_pieces(make_weight((30, 40), dtype))
    assert DeviceSum(pieces, 1.0, dtype).wide == torch.float32
    assert DeviceSum(pieces, 1.0, torch.float32).wide == torch.float64
