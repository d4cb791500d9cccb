"""Merged weights are rounded once, and merging keeps little beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from weights import DTYPES, SHARES, exact_delta, make_pieces, make_weight, nearest, scaling_for

from lightning_lora.nn.exact_merge import merge_weight_, merged_weight
from lightning_lora.nn.low_rank import LowRankBlock


@pytest.mark.parametrize("r", [4, 64])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_the_nearest_values(dtype: torch.dtype, share: float, r: int) -> None:
    weight = make_weight((300, 400), dtype)
    pieces = make_pieces(weight, r)
    scaling = scaling_for(weight, pieces, share)
    delta = exact_delta(pieces, scaling, weight.shape)
    merged = merged_weight(weight, pieces, scaling)
    assert nearest(merged, weight.double() + delta).double().mean() >= 0.9999
    if dtype == torch.float32:
        larger = torch.maximum(weight.double().abs(), delta.abs())
        ulp = torch.exp2(torch.frexp(larger)[1].double() - 24)
        assert ((merged.double() - weight.double() - delta).abs() <= 2 * ulp).all()


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


def test_the_observer_sees_the_rounded_and_the_exact_sum_of_every_element(small_blocks: None) -> None:
    weight = make_weight((30, 40), torch.bfloat16)
    before, pieces = weight.clone(), make_pieces(weight)
    seen: list[tuple[torch.Tensor, ...]] = []
    merge_weight_(weight, pieces, 0.01, observe=lambda *tensors: seen.append(tuple(t.clone() for t in tensors)))
    rounded, exact_sum, delta = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(seen) > 1
    assert torch.equal(rounded, weight.double())
    torch.testing.assert_close(delta, exact_delta(pieces, 0.01, weight.shape))
    torch.testing.assert_close(exact_sum, before.double() + exact_delta(pieces, 0.01, weight.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_of_one_per_cent_keeps_less_than_a_tenth(dtype: torch.dtype) -> None:
    weight = (0.02 * torch.randn(512, 512)).to(dtype)
    pieces = make_pieces(weight, r=8)
    kept = merge_weight_(weight, pieces, scaling_for(weight, pieces, 0.01))
    assert 0 < kept.nbytes() < 0.1 * weight.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_never_keeps_more_than_a_plain_copy(dtype: torch.dtype) -> None:
    for share in (0.1, 0.3, 1.0, 30.0):
        weight = (0.02 * torch.randn(256, 256)).to(dtype)
        pieces = make_pieces(weight, r=8)
        assert merge_weight_(weight, pieces, scaling_for(weight, pieces, share)).nbytes() <= weight.nbytes


# One bfloat16 layer of 8192 x 8192 weights: what merging holds, counted as tensors and as the process's memory.
BIG_LAYER = """
import gc, hashlib, json, sys, torch
from lightning_lora.nn.exact_merge import merge_weight_, unmerge_weight_
from lightning_lora.nn.low_rank import LowRankBlock

torch.set_num_threads(1)
N, R = 8192, 8

def live():
    tensors = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()
    return sum(tensors.values())

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def digest(tensor):
    return hashlib.sha256(tensor.detach().view(torch.int16).numpy()).hexdigest()

layer = torch.nn.Linear(N, N, bias=False, dtype=torch.bfloat16)
small = torch.zeros(512, 512, dtype=torch.bfloat16)  # a first, small merge loads the libraries
unmerge_weight_(small, merge_weight_(small, [LowRankBlock(0, 0, torch.randn(512, R), torch.randn(R, 512))], 0.1))
pieces = [LowRankBlock(0, 0, torch.randn(N, R), torch.randn(R, N))]
scaling = 0.01 * (1 / N / 3) ** 0.5 / R**0.5  # a Linear's weights are uniform with this deviation
before, start = digest(layer.weight), live()
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the peak starts here
resident = memory("VmRSS")
kept = merge_weight_(layer.weight, pieces, scaling)
merged = digest(layer.weight)
held = {"tensors": live() - start, "resident": memory("VmRSS") - resident, "peak": memory("VmHWM") - resident}
nbytes = kept.nbytes()
unmerge_weight_(layer.weight, kept)
del kept
print(held, nbytes, file=sys.stderr)
print(json.dumps(held | {
    "weight": layer.weight.nbytes, "factors": pieces[0].left.nbytes + pieces[0].right.nbytes, "kept": nbytes,
    "left": live() - start, "moved": merged != before, "back": digest(layer.weight) == before,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
def test_a_big_layer_is_merged_without_a_second_copy_of_it() -> None:
    run = subprocess.run([sys.executable, "-c", BIG_LAYER], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(run.stdout)
    assert found["moved"]
    assert found["back"]
    assert found["weight"] == 2 * 8192 * 8192
    assert found["tensors"] == found["kept"] + found["factors"]
    assert 0 < found["kept"] < 0.1 * found["weight"]
    assert found["resident"] < 0.1 * found["weight"] + found["factors"]
    scratch = 16 * 2**20  # a few temporaries of one block, A and B in float64
    assert found["peak"] < 0.1 * found["weight"] + found["factors"] + scratch
    assert found["left"] == 0
