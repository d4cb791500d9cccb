"""Under autocast on the CPU, in float16 too: there Lightning makes 16-mixed bf16-mixed, a loop of one's own does not.

W, A and B stay in float32, and what torch casts for the base's product is cast for the adapter's.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, merge, merge_and_unload, unmerge
from support.covering import covering
from support.models.layers import make_subject, rounding
from support.models.networks import randomise_

DTYPES = [torch.float16, torch.bfloat16]
KINDS = [
    *("linear, one vector", "linear, three axes", "activated linear", "linear of another library"),
    *("transformers Conv1D", "fused, outer parts", "embedding, padding", "conv1d, groups", "conv2d, circular"),
    *("conv2d, depthwise", "conv that pads", "dora, linear", "dora, embedding, padding", "dora, conv2d"),
]


@pytest.mark.parametrize(("name", "dtype"), covering(KINDS, DTYPES, meet=1))
def test_layer_under_autocast_gives_outputs_and_gradients_of_float64(name: str, dtype: torch.dtype) -> None:
    subject = make_subject(name)
    factors = [subject.layer.lora_A, subject.layer.lora_B]
    wide = [factor.detach().double().requires_grad_() for factor in factors]
    sizes = [factor.detach().double().abs().requires_grad_() for factor in factors]
    wanted, size = subject.reference(*wide), subject.reference(*sizes, magnitudes=True)
    with torch.autocast("cpu", dtype):
        output, plain = subject.model(subject.x), subject.plain(subject.x)
        merge(subject.model)
        with torch.no_grad():
            merged_output = subject.model(subject.x)
        unmerge(subject.model)
    assert output.dtype == merged_output.dtype == plain.dtype
    tolerance = rounding(dtype, size)
    for found in (output, merged_output):
        assert ((found.double() - wanted).abs() <= tolerance).all()
    assert not ((plain.double() - wanted).abs() <= tolerance).all()

    upstream = torch.randn(wanted.shape).to(output.dtype)
    output.backward(upstream)
    wanted.backward(upstream.double())
    size.backward(upstream.double().abs())
    for factor, reference, bound in zip(factors, wide, sizes, strict=True):
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
        assert ((factor.grad.double() - reference.grad).abs() <= rounding(dtype, bound.grad)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_multihead_attention_agrees_with_float64_in_every_mode(dtype: torch.dtype) -> None:
    """torch reads the weights of its encoder layer; those of the adapter are in what it reads."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    base = copy.deepcopy(model)
    inject(model, LoRAConfig(r=2, target_modules=["self_attn", "out_proj", "linear1", "linear2"]))
    randomise_(model, 0.5)
    reference = merge_and_unload(copy.deepcopy(model)).double()
    x = torch.randn(3, 5, 16)
    wanted = reference(x.double())
    scale = wanted.abs().max() * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        found, without = model(x), base(x)
        merge(model)
        with torch.no_grad():
            merged_output = model(x)
    for output in (found, merged_output):
        assert (output.double() - wanted).abs().max() < 8 * scale
    assert (without.double() - wanted).abs().max() > 64 * scale
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_" in name)
