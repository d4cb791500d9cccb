"""The merge arithmetic gives the same bits whatever surrounds the call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from lightning_lora.nn.exact_merge import merge_weight_, merged_weight, restored_weight, unmerge_weight_
from support.models.layers import make_pieces, make_weight, same_bits, scaling_for


@contextlib.contextmanager
def set_to(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def threads(count: int) -> AbstractContextManager[None]:
    return set_to(torch.get_num_threads, torch.set_num_threads, count)


def backend_precision(path: str, value: str) -> AbstractContextManager[None]:
    """torch.backends.*.fp32_precision, of torch 2.9 and newer; a plain context where it is not there."""
    owner: Any = torch.backends
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
    if not hasattr(owner, "fp32_precision"):
        return contextlib.nullcontext()
    return set_to(lambda: owner.fp32_precision, lambda new: setattr(owner, "fp32_precision", new), value)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "medium": lambda: set_to(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "all backends": lambda: backend_precision("", "tf32"),
    "mkldnn.matmul": lambda: backend_precision("mkldnn.matmul", "bf16"),
    "two threads": lambda: threads(2),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default float64": lambda: set_to(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
}


@pytest.mark.parametrize(("around_merge", "around_unmerge"), [*itertools.pairwise([*SURROUNDINGS, "plain"])])
def test_merge_gives_the_same_bits_in_any_surroundings(around_merge: str, around_unmerge: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(make_weight((96, 512), dtype))
        before, pieces = weight.detach().clone(), make_pieces(weight, r=256)
        plain = merged_weight(before, pieces, 0.0003)
        with SURROUNDINGS[around_merge]():
            kept = merge_weight_(weight, pieces, 0.0003)
            again = merged_weight(before, pieces, 0.0003)
            assert same_bits(again, plain)
            assert not again.is_inference()
        assert same_bits(weight, plain)
        with SURROUNDINGS[around_unmerge]():
            original = restored_weight(weight, kept)
            assert same_bits(original, before)
            assert not original.is_inference()  # it may be loaded and trained later
            unmerge_weight_(weight, kept)
        assert same_bits(weight, before)
        weight.sum().backward()  # still a parameter that trains
        assert weight.grad is not None


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_unmerge_with_another_number_of_threads_restores_every_bit(first: int, then: int) -> None:
    """A shape for which the last bits of a product differ between one thread and two, where torch uses MKL."""
    weight = make_weight((7, 17), torch.float64)
    before = weight.clone()
    for _ in range(5):
        with threads(first):
            kept = merge_weight_(weight, make_pieces(weight, r=256), 0.001)
        with threads(then):
            assert same_bits(restored_weight(weight, kept), before)
            unmerge_weight_(weight, kept)
        assert same_bits(weight, before)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("first", "then", "dtype"), [(1, 2, torch.bfloat16), (2, 1, torch.float32)])
def test_unmerge_of_many_chunks_cuts_them_as_the_merge_did(first: int, then: int, dtype: torch.dtype) -> None:
    """Two threads take chunks twice as large."""
    weight = make_weight((80, 40), dtype)
    before, pieces = weight.clone(), make_pieces(weight)
    with threads(first):
        kept = merge_weight_(weight, pieces, scaling_for(weight, pieces, 0.01))
    with threads(then):
        assert len(kept.chunks) == 8 // first
        assert same_bits(restored_weight(weight, kept), before)
        unmerge_weight_(weight, kept)
    assert same_bits(weight, before)


def test_merge_leaves_threads_precision_and_modes_as_they_were() -> None:
    def settings_now() -> list[Any]:
        return [
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ]

    weight = make_weight((30, 40), torch.float32)
    with threads(2):
        kept = merge_weight_(weight, make_pieces(weight), 0.001)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        before = settings_now()
        unmerge_weight_(weight, kept)
        assert settings_now() == before
        merge_weight_(weight, make_pieces(weight), 0.001)
        assert settings_now() == before
