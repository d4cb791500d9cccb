"""Singular values of a product left @ right, out of its factors, against torch's of the product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.adapter.products import singular_values

sizes = st.integers(1, 7)


@pytest.mark.slow
@given(rows=sizes, rank=sizes, columns=sizes, power=st.integers(-120, 120), seed=st.integers(0, 99), zeros=sizes)
def test_singular_values_of_any_product_are_those_of_the_product(
    rows: int, rank: int, columns: int, power: int, seed: int, zeros: int
):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    left[:, zeros:] = 0  # a lower rank than r
    found = singular_values(left * 10.0**power, right)
    expected = torch.linalg.svdvals(left @ right) * 10.0**power
    assert found.shape == (rank,)
    assert (found[:-1] >= found[1:]).all()
    known = min(rank, len(expected))
    torch.testing.assert_close(found[:known], expected[:known], rtol=1e-9, atol=1e-12 * 10.0**power)
    assert float(found[known:].sum()) == 0
    norm = float(torch.linalg.matrix_norm(left @ right)) * 10.0**power
    assert math.hypot(*found.tolist()) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_singular_values_of_what_is_not_finite_are_nan(bad: float):
    left, right = torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    left[1, 1] = bad
    assert singular_values(left, right).isnan().all()
    assert singular_values(right.T, left.T).isnan().all()
