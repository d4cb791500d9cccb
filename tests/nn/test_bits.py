"""Corrections that turn a computed tensor into the wanted bits: exact for any difference, and small."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.nn.bits import BITS, correct_, differing, far_off, find_corrections, places
from support.layers import DTYPES, make_weight, same_bits


def corrected(weight: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    bits = BITS[weight.element_size()]
    changed = (weight.view(bits) ^ computed.view(bits)).flatten().nonzero().squeeze(1)
    corrections = find_corrections(weight, computed, changed)
    result = computed.clone()
    correct_(result, corrections)
    assert same_bits(corrected_by_counts(weight, computed), result)
    return result


def corrected_by_counts(weight: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """As where a device tells the numbers of elements before their positions are known."""
    mask = differing(weight, computed)
    changed = places(mask, int(mask.sum()))
    assert torch.equal(changed, places(mask))
    corrections = find_corrections(weight, computed, changed, int(far_off(weight, computed).sum()))
    assert len(corrections.gaps) <= len(changed) + weight.numel() // 255
    result = computed.clone()
    correct_(result, corrections)
    return result


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.05, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_difference_is_corrected_to_the_bit(dtype: torch.dtype, share: float) -> None:
    """Of a few ulp and of many, across zero, between numbers that follow each other and far from each other."""
    weight = make_weight((60, 100), dtype)
    steps = torch.tensor([1, -1, 3, -127, 127, 128, -129, 10_000])[torch.randint(8, (6000,))]
    steps *= torch.rand(6000) < share
    bits = BITS[weight.element_size()]
    computed = (weight.flatten().view(bits) + steps.to(bits)).view(dtype).view(weight.shape)
    assert same_bits(corrected(weight, computed), weight)
    assert same_bits(weight, computed) == (share == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_and_values_that_are_not_finite_are_corrected(dtype: torch.dtype) -> None:
    ends = [-0.0, 0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, torch.finfo(dtype).smallest_normal / 2]
    one = torch.tensor(ends, dtype=dtype)
    for shift in range(len(ends)):
        assert same_bits(corrected(one, one.roll(shift)), one)


@pytest.mark.parametrize("gap", [1, 254, 255, 256, 509, 510, 511, 4000])
def test_a_distance_of_any_length_is_kept(gap: int) -> None:
    weight = torch.ones(2 * gap + 1)
    computed = weight.clone()
    for place in (0, gap, 2 * gap):
        computed[place] = torch.nextafter(computed[place], torch.tensor(2.0))
    assert same_bits(corrected(weight, computed), weight)
    assert same_bits(corrected(weight[1:], computed[1:]), weight[1:])


def test_an_element_that_is_one_ulp_off_takes_two_bytes() -> None:
    weight = torch.rand(100_000) + 1
    computed = weight.clone()
    off = torch.arange(0, 100_000, 20)
    computed[off] = torch.nextafter(computed[off], torch.tensor(3.0))
    corrections = find_corrections(weight, computed, off)
    assert sum(tensor.nbytes for tensor in corrections) == 2 * len(off)
