"""Linear layers with quantized weights: outputs, gradients, evaluation cycles, and the weight that stays as it is."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import held_bytes
from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    summary,
    unload,
    unmerge,
)
from lightning_lora.nn.quantized import dequantize, dtype_of, quantized_as, shape_of
from support.covering import covering
from support.models.networks import randomise_
from support.models.quantized import (
    FEATURES,
    NAMES,
    NF4,
    OF_BITSANDBYTES,
    OF_TORCHAO,
    QUANTIZED,
    WIDTH,
    adapted,
    inputs,
    network,
    packed_bits,
    quantize_,
    quantized,
    reference,
    run_reference,
    values_of,
)

every_kind = pytest.mark.parametrize("kind", QUANTIZED)
DIFFERENT = ["nf4", "int8", "Float8WeightOnlyConfig", NF4]  # the others are as one of these, with other numbers
each_different = pytest.mark.parametrize("kind", DIFFERENT)
FOUR_BITS = [kind for kind in OF_BITSANDBYTES if kind != "int8"]


@every_kind
def test_a_weight_is_recognised_and_dequantized_as_its_own_package_does(kind):
    layer = quantized(kind)[2]
    assert quantized_as(layer.weight) == NAMES[kind]
    assert torch.equal(dequantize(layer).double(), values_of(layer))
    assert dequantize(layer).shape == shape_of(layer.weight) == (WIDTH, WIDTH)
    assert dequantize(layer).dtype == dtype_of(layer.weight) == torch.float32
    assert type(dequantize(layer)) is torch.Tensor
    with torch.inference_mode():
        found = dequantize(layer)
    assert torch.equal(found, dequantize(layer))
    assert not found.is_inference()


@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
def test_a_weight_is_recognised_before_it_is_quantized_and_has_the_values_it_will_have(kind):
    model = quantized(kind, moved=False)
    assert quantized_as(model[0].weight) == NAMES[kind]
    before = [dequantize(model[position]) for position in (0, 2)]
    assert model[0].weight.dtype == torch.float32  # quantized in a copy alone
    assert getattr(model[0], "quant_state", None) is getattr(model[0].weight, "quant_state", None) is None
    assert inject(model, LoRAConfig(r=2)) == ["0", "2", "4"]
    model.to("cpu")
    assert model[0].weight.dtype in (torch.uint8, torch.int8, torch.bfloat16)
    for values, position in zip(before, (0, 2), strict=True):
        torch.testing.assert_close(values, dequantize(model[position]), rtol=0, atol=0)
    model(inputs()).sum().backward()
    assert model[0].lora_B.grad is not None


@every_kind
def test_training_outputs_and_gradients_are_those_of_float64(kind):
    model = adapted(kind)
    x = inputs().view(2, 3, FEATURES).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact_model = reference(model)
    output, exact = model(x), run_reference(exact_model, exact_x)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    exact.backward(gradient.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5)
    for position in (0, 2, 4):
        for name, expected in (("lora_A", exact_model[position].A), ("lora_B", exact_model[position].B)):
            found = getattr(model[position], name).grad.double()
            torch.testing.assert_close(found, expected.grad, rtol=1e-4, atol=1e-4)


@each_different
def test_an_adapter_that_starts_from_the_weight_starts_from_its_dequantized_values(kind):
    """PEFT refuses PiSSA on such a base, and quantizes OLoRA's residual again."""
    plain, bits, x = quantized(kind), packed_bits(quantized(kind)), inputs()
    for init in ("pissa", "olora"):
        model = adapted(kind, init_lora_weights=init)
        assert torch.equal(model(x), plain(x))
        layer = model[2]
        u, s, vh = torch.linalg.svd(values_of(layer))
        best = (u[:, :4] * s[:4]) @ vh[:4]
        if init == "pissa":
            torch.testing.assert_close(2 * (layer.lora_B @ layer.lora_A).detach().double(), best, rtol=1e-4, atol=1e-5)
        randomise_(model)
        assert not torch.allclose(model(x), plain(x), atol=1e-3)
        weights = merged_state_dict(model, dequantize=torch.float32)
        dense = network()
        dense.load_state_dict(weights)
        torch.testing.assert_close(dense(x), model(x), rtol=1e-2, atol=1e-2)
        assert packed_bits(model) == bits


@each_different
def test_gradients_after_an_evaluation_are_those_of_before(kind):
    """On a CPU with AVX512-BF16 bitsandbytes packs an evaluated layer, which then gives its input no gradient."""
    model = adapted(kind)
    evaluated = copy.deepcopy(model)
    evaluated.eval()
    with torch.no_grad(), merged(evaluated):
        evaluated(inputs())
    evaluated.train()
    grads = []
    for each in (model, evaluated):
        each(inputs()).square().sum().backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=0, atol=0)


def packed(kind: str) -> Any:
    """A quantized network that was evaluated before anything else, packed where this CPU is one of those that do it."""
    model = quantized(kind).eval()
    with torch.no_grad():
        model(inputs())
    if not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU evaluates 4-bit layers as it trains them")
    return model


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_layer_packed_for_evaluation_is_unpacked_trains_and_is_packed_again(kind):
    model, x = packed(kind), inputs().requires_grad_()
    values = values_of(quantized(kind)[2])
    with torch.no_grad():
        before = model(inputs())
    found = dequantize(model[2]).double()
    assert float((found - values).norm() / values.norm()) < 3e-3  # scales in bfloat16
    with pytest.warns(UserWarning, match="^lightning_lora: 3 4-bit layers were evaluated without an adapter"):
        inject(model, LoRAConfig(r=2, target_modules=["0"]))  # through the others the gradient goes too
    assert torch.allclose(dequantize(model[2]).double(), values, rtol=2**-8, atol=1e-5)
    model.train()
    model(x).sum().backward()
    exact_x = inputs().double().requires_grad_()
    run_reference(reference(model), exact_x).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-5)
    unload(model.eval())
    with torch.no_grad():
        model(inputs())
        assert model[0].weight.quant_state.packing_format_for_cpu
        torch.testing.assert_close(model(inputs()), before, rtol=0, atol=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_its_own_state_dict_unpacked_has_its_values_and_it_is_said_where_they_were_rounded(nested, dtype):
    bnb = pytest.importorskip("bitsandbytes").nn
    layer = bnb.Linear4bit(256, 64, bias=False, compress_statistics=nested, quant_type="nf4")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer.weight = bnb.Params4bit(weight, False, quant_type="nf4", compress_statistics=nested)
    values = dequantize(layer.to("cpu").eval()).float()
    with torch.no_grad():
        layer(torch.ones(2, 256, dtype=torch.bfloat16))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU evaluates 4-bit layers as it trains them")
    layer.state_dict()  # unpacks, with scales in another order where they are not quantized themselves
    with pytest.warns(match="1 4-bit layers") if nested or dtype != torch.bfloat16 else contextlib.nullcontext():
        inject(nn.Sequential(layer), LoRAConfig(r=2, target_modules=["0"]))
    assert float((dequantize(layer).float() - values).norm() / values.norm()) < 5e-3


@pytest.mark.parametrize(("kind", "keep"), covering(DIFFERENT, [True, False], meet=1))
def test_factors_of_a_16_bit_base_are_float32_and_outputs_close(kind, keep):
    model = adapted(kind, torch.bfloat16, autocast_adapter_dtype=keep)
    half = torch.float32 if kind == "int8" else torch.bfloat16  # int8 has no dtype of its own
    assert model[0].lora_A.dtype == (torch.float32 if keep else half)
    output = model(inputs(dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    exact = run_reference(reference(model), inputs(dtype=torch.bfloat16).double())
    assert float(((output.double() - exact).norm() / exact.norm()).detach()) < 2e-2
    output.float().sum().backward()
    assert all(layer.lora_B.grad.isfinite().all() for layer in (model[0], model[2], model[4]))


@pytest.mark.parametrize(("kind", "reentrant"), covering(DIFFERENT, [True, False], meet=1))
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    grads = []
    for segment in (False, True):
        model = adapted(kind)
        x = inputs().requires_grad_()
        output = checkpoint(model, x, use_reentrant=reentrant) if segment else model(x)
        output.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == 7
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@each_different
def test_evaluation_cycles_change_no_bit_of_the_base_while_adapters_change(kind, caplog):
    model, untouched = adapted(kind), quantized(kind)
    model.eval()
    before = packed_bits(model)
    generator = torch.Generator().manual_seed(2)
    with caplog.at_level(logging.INFO, "lightning_lora"), torch.no_grad():
        for cycle in range(20):
            merge(model)
            assert is_merged(model)
            if cycle % 5 == 0:
                factors = [p.clone() for name, p in model.named_parameters() if "lora_" in name]
                model(inputs())
                unmerge(model)
                merge(model)
                assert all(map(torch.equal, factors, [p for name, p in model.named_parameters() if "lora_" in name]))
            unmerge(model)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert packed_bits(model) == before == packed_bits(untouched)
    said = [record.getMessage() for record in caplog.records if "stay factored" in record.getMessage()]
    assert len(said) == 1
    assert f"3 layers have quantized weights ({NAMES[kind]})" in said[0]


def test_a_subclass_with_its_own_forward_keeps_it_and_gets_the_adapter():
    bnb = pytest.importorskip("bitsandbytes")

    class Doubling(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    model = adapted("nf4")
    plain = model(inputs())
    other = quantized("nf4")
    other[4].__class__ = Doubling
    inject(other, LoRAConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["4"]))
    hidden = torch.relu(other[2](torch.relu(other[0](inputs()))))
    layer = other[4]
    delta = hidden @ layer.lora_A.T @ layer.lora_B.T * 2
    with disable_adapter(other):
        base = layer(hidden)
    torch.testing.assert_close(layer(hidden), base + delta)
    assert plain.shape == layer(hidden).shape


class Reading(nn.Module):
    """Reads the weight of its layer instead of calling that, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = network()[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


def test_code_that_reads_the_weight_reads_the_dequantized_sum():
    model: Any = quantize_(Reading(), OF_TORCHAO[0])
    values, bias = values_of(model.proj), model.proj.bias.detach().double()
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    layer = model.proj
    x = torch.randn(5, WIDTH)
    output = model(x)
    delta = layer.lora.spec.scaling * (layer.lora_B @ layer.lora_A).detach().double()
    torch.testing.assert_close(output.double(), F.linear(x.double(), values + delta, bias), rtol=1e-4, atol=1e-5)
    output.sum().backward()
    assert float(layer.lora_A.grad.norm()) > 0


def test_a_quantized_embedding_is_refused_by_name():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Embedding4bit(64, 64), nn.Linear(64, 3)).to("cpu")
    with pytest.raises(LoRAError, match=r"'0': its weight is quantized \(fp4\)"):
        inject(model, LoRAConfig(target_modules=["0"]))
    assert not hasattr(model[0], "lora_A")


@each_different
def test_a_quantized_module_cannot_be_trained_whole(kind):
    model = quantized(kind)
    option = "llm_int8_skip_modules" if kind in OF_BITSANDBYTES else "modules_to_not_convert"
    option = "modules_to_save" if kind == NF4 else option
    said = rf"modules_to_save names '4', but the weight of '4' is quantized \({NAMES[kind]}.*{option}=\['4'\]"
    with pytest.raises(LoRAError, match=said):
        inject(model, LoRAConfig(target_modules=["0"], modules_to_save=["4"]))
    assert not hasattr(model[0], "lora_A")


def test_parameters_are_counted_as_what_they_stand_for():
    numbers = []
    for kind in ("nf4", None):
        model = network() if kind is None else quantized(kind)
        inject(model, LoRAConfig(r=2))
        found = summary(model)
        numbers.append((found.trainable, found.total, found.adapter_bytes))
    assert numbers[0] == numbers[1]


def test_no_dequantized_weight_outlives_the_forward_of_its_layer():
    width, layers = 256, 6
    model = quantize_(nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))), "nf4")
    inject(model, LoRAConfig(r=4))
    x = torch.randn(4, width, requires_grad=True)
    model(x).sum().backward()  # what is made once
    outputs = []
    held = held_bytes(lambda: outputs.append(model(x)))
    dequantized_layer = width * width * 4
    assert held[-1] < dequantized_layer / 2  # what is kept for backward
    assert max(held) < 4 * dequantized_layer  # bitsandbytes' own work on one layer
    assert outputs[0].requires_grad


@pytest.mark.parametrize("moved", [False, True], ids=["not quantized yet", "quantized"])
def test_8_bit_values_of_another_shape_are_refused(moved):
    state = {name: value for name, value in quantized("int8")[2].state_dict().items() if name != "weight_format"}
    layer = quantized("int8", moved=moved)[0]
    inject(model := nn.ModuleDict({"layer": layer}), LoRAConfig(r=2))
    with pytest.raises(RuntimeError, match=r"size mismatch for layer\.weight|into non-quantized"):
        model.load_state_dict({f"layer.{name}": value for name, value in state.items()}, strict=False)
    assert shape_of(layer.weight) == (WIDTH, FEATURES)


def test_plain_layers_are_in_the_mode_of_those_that_they_replace_and_none_is_said_to_stay_factored(caplog):
    for training in (False, True):
        with caplog.at_level(logging.INFO, "lightning_lora"):
            plain = merge_and_unload(adapted("nf4").train(training), dequantize="float32")
        assert [type(plain[position]) for position in (0, 2, 4)] == [nn.Linear] * 3
        assert {module.training for module in plain.modules()} == {training}
    assert [message for message in caplog.messages if "factored" in message] == []
