"""Unmerging restores every bit, however B @ A is computed: it is replaced by other products of the same factors."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import pytest
import torch

from lightning_lora.nn import exact_merge
from lightning_lora.nn.exact_merge import merge_weight_, unmerge_weight_
from lightning_lora.nn.low_rank import LowRankBlock
from support.models.layers import same_bits

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
mm = torch.mm  # the tests replace it in exact_merge
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = ["normal", "zeros", "denormal", "magnitudes", "quantized"]
FACTORS = ["normal", "cancelling", "wide", "zero rows", "bfloat16", "integers"]
SCALES = ["none", "rows", "wild rows", "negative rows", "columns"]
RANKS = [1, 2, 3, 8, 16, 33, 256]
SHARES = [1e-3, 1e-2, 1e-1, 1.0, 30.0]
SHAPES = [(256, 1024), (1024, 512), (301, 777)]
EVERY_DAY, SLOW, FULL = 6e7, 4e8, 1e9  # elements that are restored
if os.environ.get("LORA_FULL") == "1":
    SLOW = FULL


def in_pieces(size: int) -> Product:
    """Sums of `size` terms each, added one after the other."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return reduce(torch.add, [mm(a[:, i : i + size], b[i : i + size]) for i in range(0, a.shape[1], size)])

    return product


def pairwise(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    step = 1 + a.shape[1] // 40  # of a high rank, sums of some terms
    terms = [mm(a[:, i : i + step], b[i : i + step]) for i in range(0, a.shape[1], step)]
    while len(terms) > 1:
        terms = [reduce(torch.add, terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


def with_other_threads(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        return mm(a, b)
    finally:
        torch.set_num_threads(before)


def error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The largest error that a sum of these products can have."""
    most = a.shape[1] * torch.finfo(a.dtype).eps / 2
    return mm(a.abs(), b.abs()) * (most / (1 - most))


def negative_zeros(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product = mm(a, b)
    return torch.where(product == 0, -0.0, product)


PRODUCTS: dict[str, Product] = {
    "the same": mm,
    "reversed": lambda a, b: mm(a.flip(1), b.flip(0)),
    "two halves": lambda a, b: in_pieces(max(1, a.shape[1] // 2))(a, b),
    "fives": in_pieces(5),
    "one after the other": lambda a, b: in_pieces(1 if a.shape[1] <= 40 else 7)(a, b),
    "pairwise": pairwise,
    "transposed": lambda a, b: mm(b.T.contiguous(), a.T.contiguous()).T,
    "other threads": with_other_threads,
    "noise": lambda a, b: mm(a, b) + error(a, b) * (2 * torch.rand(a.shape[0], b.shape[1], dtype=a.dtype) - 1),
    "up": lambda a, b: mm(a, b) + error(a, b),
    "down": lambda a, b: mm(a, b) - error(a, b),
    "negative zeros": negative_zeros,
}


def draw_weight(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = 0.02 * torch.randn(shape, dtype=torch.float64)
    half = dtype == torch.float16
    if kind == "zeros":
        weight[torch.rand(shape) < 0.3] = 0.0
        weight[torch.rand(shape) < 0.2] = -0.0
    elif kind == "denormal":
        weight *= 1e-5 if half else 1e-38
    elif kind == "magnitudes":
        weight *= 10 ** (torch.rand(shape, dtype=torch.float64) * (8 if half else 36) - (6 if half else 33))
    elif kind == "quantized":
        weight = (weight * 512).round() / 512  # many sums lie halfway between two values
    return weight.to(dtype)


def draw_factors(kind: str, shape: tuple[int, int], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    half = rank // 2
    if kind == "cancelling" and half:
        left[:, half : 2 * half] = left[:, :half]
        right[half : 2 * half] = -right[:half] * (1 + 1e-6 * torch.randn(half, shape[1]))
    elif kind == "wide":
        left *= 10 ** (6 * torch.rand_like(left) - 6)
        right *= 10 ** (6 * torch.rand_like(right) - 6)
    elif kind == "zero rows":
        left[::2] = 0
        right[:, ::3] = 0
    elif kind == "bfloat16":
        left, right = left.bfloat16(), right.bfloat16()
    elif kind == "integers":
        left, right = (4 * left).round(), (4 * right).round()
    return left, right


def draw_scale(kind: str, shape: tuple[int, int]) -> torch.Tensor | None:
    rows = torch.rand(shape[0], 1)
    scales = {
        "none": None,
        "rows": 0.9 + 0.2 * rows,
        "wild rows": 10 ** (4 * rows - 2),
        "negative rows": -0.5 - rows,
        "columns": 0.9 + 0.2 * torch.rand(1, shape[1]),
    }
    return scales[kind]


class OtherTorch:
    """Stands in for torch, with another matrix product."""

    product: Product = staticmethod(mm)

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def mm(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        product = self.product(a, b)
        return product if out is None else out.copy_(product)


def restore_under_other_products(elements: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge and unmerge drawn weights until so many elements were restored; fail with every product that erred."""
    torch.manual_seed(seed)
    draw, restored, wrong = random.Random(seed), 0, dict[str, int]()
    torch_with = OtherTorch()
    monkeypatch.setattr(exact_merge, "torch", torch_with)
    monkeypatch.setattr(exact_merge, "KEEP_AT_MOST", 2.0)  # no chunk is copied whole
    while restored < elements:
        dtype, shape, rank = draw.choice(DTYPES), draw.choice(SHAPES), draw.choice(RANKS)
        weight_kind, factor_kind, scale_kind = draw.choice(WEIGHTS), draw.choice(FACTORS), draw.choice(SCALES)
        before, (left, right) = draw_weight(weight_kind, shape, dtype), draw_factors(factor_kind, shape, rank)
        block = LowRankBlock(0, 0, left, right, draw_scale(scale_kind, shape))
        delta = mm(left.double(), right.double()).norm()
        scaling = draw.choice(SHARES) * float(before.double().norm() / delta) if delta > 0 else 1.0
        weight, torch_with.product = before.clone(), PRODUCTS[draw.choice(["the same", "the same", "up", "down"])]
        try:
            undo = merge_weight_(weight, [block], scaling)
        except exact_merge.NonFiniteError:
            continue
        for name, product in PRODUCTS.items():
            back, torch_with.product = weight.clone(), product
            try:
                unmerge_weight_(back, replace(undo, chunks=list(undo.chunks)))
            except exact_merge.LoRAError:
                assert not same_bits(back, before)
            bits = exact_merge.BITS[back.element_size()]
            if count := int((back.view(bits) != before.view(bits)).sum()):
                case = f"{name}: {dtype}, {weight_kind}, {factor_kind}, {scale_kind}, r={rank}"
                wrong[case] = wrong.get(case, 0) + count
            restored += back.numel()
    assert not wrong, f"{sum(wrong.values())} of {restored:,} elements: {wrong}"


def test_every_product_with_the_usual_error_bound_restores_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    restore_under_other_products(EVERY_DAY, 0, monkeypatch)


@pytest.mark.slow
def test_every_product_restores_every_bit_of_many_more_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """LORA_FULL=1 restores 1e9."""
    restore_under_other_products(SLOW, 1, monkeypatch)
