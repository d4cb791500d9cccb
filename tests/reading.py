"""Modules of torch that read weights, adapted, and compared with a float64 reference that is written out by hand.

The reference is the plain module with its weights replaced by the sums, so that its autograd gives the reference
gradients too.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, inject, merge, unmerge

D = 8
FUSED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Block(nn.Module):
    """Gives the reader a name and returns tensors only."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, *args, **kwargs):
        output = self.reader(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def build(make) -> Block:
    """Without dropout, so that training mode has one right answer; with biases and norms that are not trivial."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True, but self.use_nested_tensor is", UserWarning)
        block = Block(make())
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block


def adapted(block: Block, **options) -> Block:
    """A copy with non-zero adapters."""
    block = copy.deepcopy(block)
    inject(block, LoRAConfig(**{"r": 2, "lora_alpha": 3, **options}))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    return block


def factors_of(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in block.named_parameters() if name.endswith(("lora_A", "lora_B"))}


def sums(plain: nn.Module, factors: dict[str, torch.Tensor], s: float, enabled: list[bool]) -> dict[str, torch.Tensor]:
    """W + s * B @ A by weight name, written out for each kind of layer."""
    result = {}
    weights = dict(plain.named_parameters())
    for path in {name.rpartition(".")[0] for name in factors}:
        a, b = factors[f"{path}.lora_A"], factors[f"{path}.lora_B"]
        parts = [i for i in range(3) if enabled[i]]
        if f"{path}.weight" in weights:
            result[f"{path}.weight"] = weights[f"{path}.weight"] + s * b @ a
        elif f"{path}.{FUSED}" in weights:
            delta = torch.zeros(3 * D, D, dtype=a.dtype)
            if all(enabled) and a.shape[0] == b.shape[1]:
                delta = b @ a
            else:
                rank = b.shape[1]
                for n, i in enumerate(parts):
                    delta[i * D : (i + 1) * D] = b[n * D : (n + 1) * D] @ a[n * rank : (n + 1) * rank]
            result[f"{path}.{FUSED}"] = weights[f"{path}.{FUSED}"] + s * delta
        else:
            column = 0
            for n, i in enumerate(parts):
                name = f"{path}.{SEPARATE[i]}"
                width = weights[name].shape[1]
                result[name] = weights[name] + s * b[n * D : (n + 1) * D] @ a[:, column : column + width]
                column += width
    return result


def check(
    base: Block, args, kwargs=None, *, dtype=torch.float64, valid=slice(None), enabled=(True, True, True), **options
) -> None:
    """Output and gradients of every mode against float64."""
    kwargs = kwargs or {}
    plain = copy.deepcopy(base).double().train()
    block = adapted(base.to(dtype), **options)
    double, args = tuple(arg.double() for arg in args), [arg.to(dtype) for arg in args]
    factors = {name: p.detach().double().requires_grad_() for name, p in factors_of(block).items()}
    assert factors
    expected = functional_call(plain, sums(plain, factors, 1.5, list(enabled)), double, kwargs)
    pull = torch.randn(expected[valid].shape, dtype=dtype)
    wanted = torch.autograd.grad((expected[valid] * pull.double()).sum(), list(factors.values()))
    gradients = dict(zip(factors, wanted, strict=True))
    assert (functional_call(plain, {}, double, kwargs) - expected)[valid].abs().max() > 0.1  # the adapter matters
    for training in (True, False):
        block.train(training)
        block.zero_grad()
        output = block(*args, **kwargs)
        close(output[valid], expected[valid])
        (output[valid] * pull).sum().backward()
        for name, factor in factors_of(block).items():
            close(factor.grad, gradients[name])
            assert factor.grad.abs().max() > 1e-3, name
        with torch.no_grad():
            close(block(*args, **kwargs)[valid], expected[valid])
        merge(block)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                close(block(*args, **kwargs)[valid], expected[valid])
        unmerge(block)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    expected = expected.detach()
    relative = {torch.float64: 1e-12, torch.float32: 1e-5}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=relative * float(expected.abs().max().clamp(1)))
