"""Modules of torch that read weights directly give W + s * B @ A: trained, evaluated, merged and unmerged.

The float64 reference is the plain module with its weights replaced by the sums, written out by hand, so that
its autograd gives the reference gradients too.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, disable_adapter, inject, merge, merge_and_unload, unload, unmerge
from support.covering import covering

D = 8
FUSED = "in_proj_weight"


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
        warnings.filterwarnings("ignore", "enable_nested_tensor is True, but self.use_nested_tensor is")
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
    return {name: p for name, p in block.named_parameters() if "lora_" in name}


def sums(plain: nn.Module, factors: dict[str, torch.Tensor], s: float, enabled: list[bool]) -> dict[str, torch.Tensor]:
    """W + s * B @ A by weight name, written out for each kind of layer."""
    result = {}
    weights = dict(plain.named_parameters())
    for weight in [name.replace("lora_A_", "") for name in factors if "lora_A_" in name]:
        owner, _, leaf = weight.rpartition(".")
        result[weight] = weights[weight] + s * factors[f"{owner}.lora_B_{leaf}"] @ factors[f"{owner}.lora_A_{leaf}"]
    for path in {name.rpartition(".")[0] for name in factors if name.endswith("lora_A")}:
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


# torch's own fast path warns of the nested tensors that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")

HEADS, FF, BATCH, LENGTH = 2, 16, 3, 5


def source(length: int = LENGTH, width: int = D) -> torch.Tensor:
    return torch.randn(BATCH, length, width)


def padding() -> torch.Tensor:
    """Left-aligned, as nested tensors need it; the longest sample fills the length."""
    return torch.arange(LENGTH) >= torch.tensor([[LENGTH], [3], [2]])


def encoder(**kwargs) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True, **kwargs), 2)


TARGETS = ["all-linear", ["linear1"], ["out_proj"], ["self_attn"], ["self_attn", "linear1", "linear2"]]


@pytest.mark.parametrize(
    ("targets", "norm_first", "dtype"), covering(TARGETS[::2], [False, True], [torch.float32, torch.float64], meet=1)
)
def test_encoder_layer_agrees_with_float64_in_every_mode(targets, norm_first, dtype):
    base = build(lambda: nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True, norm_first=norm_first))
    check(base, [source()], dtype=dtype, target_modules=targets)


@pytest.mark.parametrize(("targets", "norm_first"), covering(TARGETS, [False, True], meet=1))
def test_encoder_with_padding_agrees_with_float64_in_every_mode(targets, norm_first):
    check(
        build(lambda: encoder(norm_first=norm_first, activation="gelu")),
        [source()],
        {"src_key_padding_mask": padding()},
        valid=~padding(),
        target_modules=targets,
    )


DECODERS = [["self_attn", "multihead_attn"], ["multihead_attn.out_proj"], "all-linear"]


@pytest.mark.parametrize(("targets", "norm_first"), covering(DECODERS, [False, True], meet=1))
def test_decoder_layer_agrees_with_float64_in_every_mode(targets, norm_first):
    base = build(lambda: nn.TransformerDecoderLayer(D, HEADS, FF, batch_first=True, norm_first=norm_first))
    check(base, [source(), source(4)], target_modules=targets)


def test_whole_transformer_agrees_with_float64_in_every_mode():
    base = build(lambda: nn.Transformer(D, HEADS, 2, 2, FF))
    args = [torch.randn(LENGTH, BATCH, D), torch.randn(4, BATCH, D)]
    check(base, args, target_modules=["self_attn", "multihead_attn", "linear1", "linear2"])


SHAPES = {
    "plain": {},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "no_bias": {"bias": False},
    "widths": {"kdim": 6, "vdim": 4},
    "odd_heads": {"num_heads": 1},
}


OPTIONS = {
    "whole": {"target_modules": ["reader"]},
    "in_proj": {"target_modules": ["reader"], "exclude_modules": ["out_proj"]},
    "out_proj": {"target_modules": ["out_proj"]},
    "query_value": {
        "target_modules": ["reader"],
        "enable_lora": {"reader": [True, False, True]},
        "enabled": [True, False, True],
    },
}


def differs(shape: str, adapted: str, batch_first: bool) -> bool:
    """Whether it is no second case of another: options meet one fused weight, or three weights of own widths."""
    return shape in ("plain", "widths") or (adapted == "whole" and batch_first)


@pytest.mark.parametrize(
    ("shape", "adapted", "batch_first"), covering([*SHAPES], [*OPTIONS], [True, False], fits=differs)
)
def test_multihead_attention_agrees_with_float64_in_every_mode(shape, adapted, batch_first):
    extra, options = SHAPES[shape], OPTIONS[adapted]
    kwargs = {"embed_dim": D, "num_heads": HEADS, "batch_first": batch_first, **extra}
    base = build(lambda: nn.MultiheadAttention(**kwargs))
    query = source()
    args = [query, query, query]
    if shape == "widths":
        if "enabled" in options:  # its weights are single parameters
            options = {"target_modules": ["out_proj"], "target_parameters": ["q_proj_weight", "v_proj_weight"]}
        args = [query, source(width=6), source(width=4)]
    check(base, args, **options)
    check(base, args, {"need_weights": False}, **options)


def test_attention_weights_with_masks_and_unbatched_input_agree_with_float64():
    base = build(lambda: nn.MultiheadAttention(D, HEADS, batch_first=True))
    block, query = adapted(base, target_modules=["reader"]), source()
    factors = {name: p.double() for name, p in factors_of(block).items()}
    plain = copy.deepcopy(base).double()
    weights = {n.removeprefix("reader."): w for n, w in sums(plain, factors, 1.5, [True] * 3).items()}
    masks = [
        {},
        {"key_padding_mask": padding()},
        {"attn_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH), "is_causal": True},
        {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)},
    ]
    for merged_state in (False, True):
        (merge if merged_state else unmerge)(block)
        for training in (True, False):
            block.train(training)
            for kwargs in masks:
                kwargs = {**kwargs, "average_attn_weights": False}
                wide = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in kwargs.items()}
                with torch.no_grad():
                    found = block.reader(query, query, query, **kwargs)
                    expected = functional_call(plain.reader, weights, (query.double(),) * 3, wide)
                close(found[0], expected[0])
                close(found[1], expected[1])
            one = query[0]
            close(block(one, one, one), functional_call(plain.reader, weights, (one.double(),) * 3)[0])


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(block: nn.Module, *args, **kwargs) -> list[str]:
    with Operators() as seen, torch.no_grad():
        block(*args, **kwargs)
    return seen.names


FAST = {
    "layer": (lambda: nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True), {}, "_transformer_encoder_layer_fwd"),
    "encoder": (encoder, {"src_key_padding_mask": padding()}, "_nested_tensor_from_mask"),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(D, HEADS, FF, batch_first=True),
        {"memory": torch.randn(BATCH, 4, D)},
        "_native_multi_head_attention",
    ),
}


@pytest.mark.parametrize(("kind", "targets"), covering([*FAST], TARGETS, meet=1))
def test_merged_evaluation_takes_the_fast_path_of_the_base_again(kind, targets):
    make, kwargs, fast = FAST[kind]
    base = build(make).eval().requires_grad_(False)
    block, x = adapted(base, target_modules=targets), source()
    expected = operators(base, x, **kwargs)
    assert any(fast in name for name in expected)
    assert operators(block, x, **kwargs) != expected
    for name in ("_transformer_encoder_layer_fwd", "_nested_tensor_from_mask"):
        assert not any(name in ran for ran in operators(block, x, **kwargs))
    merge(block)
    assert operators(block, x, **kwargs) == expected
    unmerge(block)
    assert operators(block, x, **kwargs) != expected
    with disable_adapter(block):
        assert operators(block, x, **kwargs) == expected
        assert torch.equal(block(x, **kwargs), base(x, **kwargs))
    assert operators(block, x, **kwargs) != expected
    unload(block)
    assert operators(block, x, **kwargs) == expected


def attributes(block: nn.Module) -> dict[str, object]:
    """All that a module holds, by name, with parameters and hooks reduced to what can be compared."""
    return {
        f"{path}:{name}": sorted(value) if isinstance(value, dict) else value
        for path, module in block.named_modules()
        for name, value in [("class", type(module)), *vars(module).items()]
    }


@pytest.mark.parametrize(
    ("end", "activation", "enable_nested_tensor"),
    covering([unload, merge_and_unload], ["relu", "gelu", nn.functional.silu], [False, True], meet=1),
)
def test_unload_of_an_encoder_restores_every_attribute(end, activation, enable_nested_tensor):
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True, activation=activation)
    base = build(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor)).eval()
    hook = base.reader.layers[0].register_forward_pre_hook(lambda module, args: None)
    block = copy.deepcopy(base)
    before = attributes(block)
    inject(block, LoRAConfig(target_modules=["self_attn", "linear1"]))
    assert attributes(block) != before
    merge(block)
    unmerge(block)
    end(block)
    assert attributes(block) == before
    hook.remove()
