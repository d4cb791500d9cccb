"""Each kind of layer on a device that is not the CPU, beside the same layer on the CPU: steps, and merging."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, is_merged, merge, unmerge
from support.covering import covering
from support.devices.places import Place
from support.models import parameters as of_parameters
from support.models.layers import CASES, Holder, same_bits
from support.models.variants import define_gated, variants_forgotten

pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),  # of cuDNN
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
KINDS = ("linear", "linear, three axes", "transformers Conv1D", "conv2d", "conv1d, groups", "embedding, padding")
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # and the kinds of layers that take them
    "PiSSA": ({"init_lora_weights": "pissa"}, ("linear, three axes", "conv2d")),
    "OLoRA": ({"init_lora_weights": "olora"}, ("linear", "transformers Conv1D")),
    "LoHa": ({"variant": "loha"}, ("linear, three axes", "conv2d")),
    "own": ({"variant": "gated"}, ("linear", "transformers Conv1D")),
    "rsLoRA with biases": ({"use_rslora": True, "bias": "lora_only"}, ("linear", "conv1d, groups")),
}
SUBJECTS = [
    *KINDS,
    *("activated linear", "fused, outer parts", "fused Conv1D", "embedding, sparse", "conv2d, depthwise"),
    *("conv3d, circular", "conv that pads"),
    *("dora, linear", "dora, transformers Conv1D", "dora, embedding, padding", "dora, conv2d"),
    *(f"{name}: {kind}" for name, (_, kinds) in OPTIONS.items() for kind in kinds),
    *(f"parameters: {name}" for name in ("lstm", "gru, packed", "transposed experts", "matrix")),
]

# The precision of the weights, of autocast, and how far a device may be from the CPU, which computes in other orders.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None, float]] = {
    "float32": (torch.float32, None, 2e-6),
    "bfloat16": (torch.bfloat16, None, 3e-2),
    "float16": (torch.float16, None, 6e-3),
    "float64": (torch.float64, None, 1e-14),
    "autocast": (torch.float32, torch.bfloat16, 3e-2),
}
MET = [*covering(SUBJECTS, [*PRECISIONS], meet=1), *covering(["linear, three axes", "dora, linear"], [*PRECISIONS])]


def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """An adapted model on the CPU that is away from its start, and an input."""
    torch.manual_seed(0)
    variant, _, kind = name.rpartition(": ")
    if variant == "parameters":
        case: Any = of_parameters.CASES[kind]
        model, x = of_parameters.Model(case.build()).to(dtype), torch.randn(2, 4, 5).to(dtype)
        options: dict[str, Any] = {"target_modules": [], "target_parameters": list(case.targets)}
    else:
        case = CASES[kind]
        model, x = Holder(case.build()).to(dtype), case.make_input(dtype)
        options = {"target_modules": ["layer"], **case.options, **(OPTIONS[variant][0] if variant else {})}
        if case.parts:
            options["enable_lora"] = {"layer": list(case.parts)}
    inject(model, LoRAConfig(**{"r": 3, "lora_alpha": 4.5, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
    return model, x


def step(model: nn.Module, x: torch.Tensor, autocast: AbstractContextManager[Any]) -> dict[str, torch.Tensor]:
    """The output and every gradient, on the CPU."""
    x = x.detach().requires_grad_(x.is_floating_point())
    with autocast:
        out = model(x)
    wanted = torch.linspace(0.5, 1.5, out.numel()).view(out.shape)
    (out.double() * wanted.to(out.device).double()).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    found |= {"output": out, "input": x.grad} if x.requires_grad else {"output": out}
    for tensor in found.values():
        assert tensor is not None
        assert tensor.device == x.device
    return {name: tensor.detach().to_dense().cpu() for name, tensor in found.items()}


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    size = expected.double().norm()
    assert size > 0, what
    distance = (found.double() - expected.double()).norm()
    assert distance <= tolerance * size, f"{what}: {distance / size:.1e}"


@pytest.fixture(autouse=True)
def own_variant() -> Any:
    with variants_forgotten():
        define_gated()
        yield


@pytest.mark.parametrize(("name", "precision"), MET)
def test_a_step_on_a_device_is_that_on_the_cpu(name: str, precision: str, a_device: Place):
    dtype, cast, tolerance = PRECISIONS[precision]

    def autocast(device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, cast) if cast else nullcontext()

    model, x = make(name, dtype)
    expected = step(copy.deepcopy(model), x, autocast("cpu"))
    with a_device() as device:
        found = step(model.to(device), x.to(device), autocast(device))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same_lists = not (cast and name.startswith("parameters"))  # autocast has other lists of cells for the CPU
        assert found[key].dtype == value.dtype or not same_lists, key
        assert_near(found[key], value, tolerance, key)


@pytest.mark.parametrize(("name", "precision"), MET)
def test_a_layer_is_merged_on_a_device_as_on_the_cpu_and_every_bit_comes_back(
    name: str, precision: str, a_device: Place
):
    dtype, _, tolerance = PRECISIONS["float32" if precision == "autocast" else precision]
    model, x = make(name, dtype)
    merge(there := copy.deepcopy(model.eval()))
    expected = dict(there.named_parameters())
    with a_device() as device:
        before = {key: value.clone() for key, value in model.named_parameters()}
        model.to(device)
        with torch.no_grad():
            answer = model(x.to(device))
        merge(model)
        assert is_merged(model)
        assert {value.device.type for value in model.parameters()} == {device}
        with torch.no_grad():
            merged = model(x.to(device))
        values = {key: value.detach().cpu() for key, value in model.named_parameters()}
        unmerge(model)
        after = {key: value.detach().cpu() for key, value in model.named_parameters()}
        assert_near(merged.cpu(), answer.cpu(), 2 * tolerance, "merged output")
    norms_in_float32 = "dora" in name and dtype == torch.float32  # whose last bits differ between devices
    for key, value in expected.items():
        if dtype != torch.float64 and not norms_in_float32:  # else sums are not wider than the weight
            different = (values[key] != value).double().mean()
            assert different <= (1e-2 if dtype.itemsize == 2 else 0), key
        torch.testing.assert_close(values[key], value, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        assert same_bits(after[key], before[key]), key
