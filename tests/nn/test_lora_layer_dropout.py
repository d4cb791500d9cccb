"""lora_dropout: nothing in evaluation; in training one mask on what the adapter gets, on every path of a forward.

The table compares outputs and gradients with the formulas in float64, under the mask that the same seed draws.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, disable_adapter, inject
from lightning_lora.nn.lora_layer import drop
from support.covering import covering
from support.devices.places import Place
from support.models.layers import ALPHA, CASES, Case, Holder, R, make_subject, matrix
from support.models.quantized import QUANTIZED, adapted, inputs

P = 0.5  # a value that is kept is doubled, exactly in every dtype

# The table: kinds of layers, ways to run them, precisions -----------------------------------------------------------

SOME = (
    *("linear, one vector", "linear, three axes", "activated linear", "linear of another library"),
    *("transformers Conv1D", "fused, outer parts", "conv1d, unbatched", "conv2d, circular", "conv2d, depthwise"),
    *("conv that pads", "dora, linear, three axes", "dora, transformers Conv1D", "dora, conv2d"),
)
KINDS = {name: CASES[name] for name in SOME}
KINDS["pissa"] = replace(CASES["linear, three axes"], options={"init_lora_weights": "pissa"})
# These build W' without the input, so a mask is of whole features of it.
DENSE = [name for name in KINDS if any(each in name for each in ("activated", "that pads"))]

WAYS = ("cpu", "device", "transformed", "without gradients", "not contiguous")
PRECISIONS = {"float32": (torch.float32, 4e-6), "bfloat16": (torch.bfloat16, 3e-2)}


def is_a_row(kind: str, way: str, precision: str) -> bool:
    """Only nn.Linear takes an input that is not contiguous by a way of its own."""
    return way != "not contiguous" or (len(KINDS[kind].shape) == 3 and "conv" not in kind.lower())


# What is expected: in float64, from the definitions -----------------------------------------------------------------


class Made(NamedTuple):
    """An adapted model in training mode, the plain one, and an input."""

    model: Any
    plain: Any
    x: torch.Tensor


def make(kind: str, dtype: torch.dtype) -> Made:
    """Factors are about as large as W, so that a product with another mask is another output."""
    case = KINDS[kind]
    plain = Holder(case.build()).to(dtype)
    model = copy.deepcopy(plain)
    plain.requires_grad_(False)
    options: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], "lora_dropout": P}
    if case.parts:
        options["enable_lora"] = {"layer": list(case.parts)}
    inject(model, LoRAConfig(**options | case.options))
    layer: Any = model.layer
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and name != "lora_magnitude":
                parameter.add_(0.5 * torch.randn(parameter.shape))
        if "use_dora" in case.options:  # about 1 times the norm, so that no large terms cancel
            norms = layer.lora_magnitude / layer.effective_factors().scale
            layer.lora_magnitude.copy_(norms * (0.8 + 0.4 * torch.rand(norms.shape)))
    return Made(model.train(), plain, case.make_input(dtype))


def change(made: Made, case: Case, factors: dict[str, torch.Tensor], features: torch.Tensor | None) -> torch.Tensor:
    """s * B @ A as the layer stores it; with a mask of A's columns, where the layer runs on W'."""
    layer, plain = made.model.layer, made.plain.layer
    a, b = factors["lora_A"], factors["lora_B"]
    delta = matrix(plain, a if features is None else a * features, b, case.parts)
    if "init_lora_weights" in case.options:
        starts = (getattr(layer, name).detach().double() for name in ("lora_start_A", "lora_start_B"))
        delta = delta - matrix(plain, *starts, case.parts)
    return (ALPHA / R * delta).reshape(plain.weight.shape)


def expected(made: Made, case: Case, mask: torch.Tensor, *, dense: bool) -> dict[str, torch.Tensor]:
    """The output, and the gradients of it times a fixed tensor."""
    wide = copy.deepcopy(made.plain).double()
    weight = wide.layer.weight.detach()
    trained = {name: each for name, each in made.model.layer.named_parameters() if each.requires_grad}
    factors = {name: each.detach().double().requires_grad_() for name, each in trained.items()}
    x = made.x.double().requires_grad_()
    bias = wide.layer.bias

    def run(weight: torch.Tensor, x: torch.Tensor, *, biased: bool = False) -> torch.Tensor:
        state = {"layer.weight": weight}
        if bias is not None:
            state["layer.bias"] = bias if biased else torch.zeros_like(bias)
        result: torch.Tensor = functional_call(wide, state, (x,))
        return result

    delta, scale = change(made, case, factors, mask if dense else None), None
    if "use_dora" in case.options:
        whole = (weight + change(made, case, factors, None)).detach()
        inputs = 0 if isinstance(wide.layer, Conv1D) else tuple(range(1, whole.dim()))
        norms = torch.linalg.vector_norm(whole, dim=inputs, keepdim=True)
        scale = factors["lora_magnitude"].view(norms.shape) / norms
    if dense:
        output = run(weight + delta if scale is None else scale * (weight + delta), x, biased=True)
    else:
        product = run(delta, x * mask.double())
        output = run(weight, x, biased=True) + product
        if scale is not None:
            per_output = scale.view(-1, *[1] * (weight.dim() - 2)) if weight.dim() > 2 else scale.flatten()
            output = output + (per_output - 1) * (run(weight, x) + product)
    (output * upstream(output)).sum().backward()
    return {"output": output.detach(), "input": x.grad} | {name: each.grad for name, each in factors.items()}  # type: ignore[dict-item]


def upstream(output: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).view(output.shape)


def mask_of(made: Made, x: torch.Tensor, way: str, *, dense: bool) -> torch.Tensor:
    """The mask that the seed draws, 0 and 2: torch's own, but of the CPU's inputs."""
    torch.manual_seed(5)
    if dense:
        a = made.model.layer.lora_A
        mask = F.dropout(torch.ones(1, a.shape[1], *[1] * (a.dim() - 2), dtype=a.dtype), P)
    elif way in ("device", "transformed"):
        mask = F.dropout(torch.ones_like(x), P)
    else:
        kept, factor = drop(torch.ones_like(x), P)
        mask = kept * factor
    assert mask.unique().tolist() == [0, 2]
    return mask


# What is found ------------------------------------------------------------------------------------------------------


def step(model: Any, x: torch.Tensor, *, gradients: bool = True) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_(gradients)
    torch.manual_seed(5)
    with nullcontext() if gradients else torch.no_grad():
        output = model(x)
    if not gradients:
        return {"output": output.cpu()}
    (output.double() * upstream(output).to(output.device)).sum().backward()
    trained = {name: each.grad for name, each in model.layer.named_parameters() if each.requires_grad}
    return {name: each.detach().cpu() for name, each in {"output": output, "input": x.grad, **trained}.items()}  # type: ignore[union-attr]


def transformed(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Under torch.func, whose transforms a layer's own operations do not know."""
    trained = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    torch.manual_seed(5)
    output, pull = torch.func.vjp(lambda state, x: functional_call(model, state, (x,)), trained, x)
    factors, of_input = pull(upstream(output).to(output.dtype))
    return {"output": output, "input": of_input} | {n.removeprefix("layer."): each for n, each in factors.items()}


@pytest.mark.parametrize(("kind", "way", "precision"), covering([*KINDS], WAYS, [*PRECISIONS], fits=is_a_row))
def test_the_mask_is_on_what_the_adapter_gets_on_every_path(
    kind: str, way: str, precision: str, a_device: Place
) -> None:
    dtype, tolerance = PRECISIONS[precision]
    made, case, dense = make(kind, dtype), KINDS[kind], kind in DENSE
    if way == "not contiguous":
        made = made._replace(x=made.x.mT.contiguous().mT)
    mask = mask_of(made, made.x, way, dense=dense)
    wanted = expected(made, case, mask, dense=dense)
    if way == "device":
        with a_device() as device:
            found = step(made.model.to(device), made.x.to(device))
    elif way == "transformed":
        found = transformed(made.model, made.x)
    else:
        found = step(made.model, made.x, gradients=way != "without gradients")
    for name, value in found.items():
        distance = (value.double() - wanted[name]).norm() / wanted[name].norm()
        assert distance <= tolerance, f"{name}: {distance:.1e}"
    assert len(found) == (1 if way == "without gradients" else len(wanted))


@pytest.mark.parametrize(
    ("apart", "targets", "way"),
    [
        (False, ["layer", "layer.out_proj"], "cpu"),
        (True, ["layer"], "cpu"),
        (False, ["layer"], "device"),
        (True, ["layer", "layer.out_proj"], "device"),
    ],
)
def test_attention_runs_on_weights_with_a_mask_of_features(apart: bool, targets: list[str], way: str, a_device: Place):
    sizes = {"kdim": 6, "vdim": 4} if apart else {}
    plain: Any = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    x = torch.randn(2, 5, 8), torch.randn(2, 5, sizes.get("kdim", 8)), torch.randn(2, 5, sizes.get("vdim", 8))
    inject(model := Holder(copy.deepcopy(plain)), LoRAConfig(r=2, target_modules=targets, lora_dropout=P))
    layer: Any = model.train().layer
    for each in model.parameters():
        each.data.add_(0.3 * torch.randn(each.shape) if each.requires_grad else 0)
    torch.manual_seed(5)
    state = {name: value.detach().double() for name, value in plain.state_dict().items()}
    factors = {
        name: each.detach().double().requires_grad_() for name, each in layer.named_parameters() if "lora" in name
    }
    weights = {
        "out_proj.lora_A": "out_proj.weight",
        "lora_A": "in_proj_weight",
    }  # in the order of drawing
    weights |= {f"lora_A_{letter}_proj_weight": f"{letter}_proj_weight" for letter in "qkv"}
    for name in filter(factors.__contains__, weights):
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        mask = F.dropout(torch.ones(1, a.shape[1]), P)
        assert set(mask.unique().tolist()) <= {0, 2}
        state[weights[name]] += 4 * b @ (a * mask.double())
    wanted = functional_call(plain.double(), state, tuple(each.double() for each in x))[0]
    (wanted * upstream(wanted)).sum().backward()
    with a_device() if way == "device" else nullcontext("cpu") as device:
        torch.manual_seed(5)
        found = model.to(device).layer(*(each.to(device) for each in x))[0]
        (found * upstream(found).float().to(device)).sum().backward()
        torch.testing.assert_close(found.detach().cpu().double(), wanted.detach(), rtol=0, atol=1e-4)
        for name, each in factors.items():
            torch.testing.assert_close(layer.get_parameter(name).grad.cpu().double(), each.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_mask_is_on_what_the_adapter_of_a_quantized_layer_gets(kind: str) -> None:
    """Beside the layer's own outputs and gradients, which its class computes."""
    model = adapted(kind, lora_dropout=P).train()
    layer = model[0]
    with disable_adapter(model):
        base_output, base_input = outputs_and_gradient(layer, inputs())
        assert torch.equal(base_output, layer(inputs()))  # nothing is dropped
    torch.manual_seed(5)
    kept, factor = drop(torch.ones_like(inputs()), P)
    found, of_input = outputs_and_gradient(layer, inputs())
    x = inputs().double().requires_grad_()
    a, b = (each.detach().double().requires_grad_() for each in (layer.lora_A, layer.lora_B))
    product = 2 * (x * kept * factor) @ a.T @ b.T
    (product * upstream(product)).sum().backward()
    for name, one, other in (
        ("output", found - base_output, product),
        ("input", of_input - base_input, x.grad),
        ("A", layer.lora_A.grad, a.grad),
        ("B", layer.lora_B.grad, b.grad),
    ):
        assert (one.double() - other).norm() <= 2e-6 * other.norm() * (10 if name == "output" else 1), name  # type: ignore[union-attr]


def outputs_and_gradient(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x.requires_grad_()
    torch.manual_seed(5)
    output = layer(x)
    (output * upstream(output).to(output.dtype)).sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad


# What a mask is, and where there is none ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SOME, "embedding, padding"])
def test_dropout_does_nothing_in_evaluation_and_where_the_adapter_is_off(name: str) -> None:
    subject, same = make_subject(name, lora_dropout=P), make_subject(name)
    same.model.load_state_dict(subject.model.state_dict())
    for model in (subject.model, subject.model.train().eval()):
        assert torch.equal(model(subject.x), same.model(subject.x))
    with disable_adapter(subject.model.train()):
        assert torch.equal(subject.model(subject.x), subject.plain(subject.x))


@pytest.mark.parametrize("name", ["linear", "conv2d, pointwise"])
def test_the_share_of_dropped_features_is_p(name: str) -> None:
    """Where only one input feature is not zero, the adapter's output is there, scaled, or it is not."""
    subject = make_subject(name, torch.float64, lora_dropout=P)
    subject.x.zero_()
    channel = subject.x.select(-1 if subject.x.dim() < 4 else 1, 2)
    channel.fill_(1.0)
    full = subject.model(subject.x).detach() - subject.plain(subject.x)
    subject.model.train()
    with torch.no_grad():
        found = torch.stack([subject.model(subject.x) for _ in range(500)]) - subject.plain(subject.x)
    share = found / full
    kept = share.abs() > 0.5
    torch.testing.assert_close(share[kept], torch.full_like(share[kept], 1 / (1 - P)), rtol=1e-4, atol=0)
    assert (share[~kept].abs() < 1e-9).all()
    assert abs(kept.double().mean() - (1 - P)) < 0.1


@pytest.mark.parametrize("name", ["embedding, padding", "dora, embedding, padding"])
def test_dropout_on_an_embedding_drops_nothing(name: str) -> None:
    subject = make_subject(name, lora_dropout=P)
    assert torch.equal(subject.model.train()(subject.x), subject.model.eval()(subject.x))


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_a_share_beyond_what_16_bits_tell_keeps_outputs_finite(p: float) -> None:
    x, factor = drop(torch.ones(8), p)
    assert torch.isfinite(x * factor).all()
    assert 1 <= factor <= 2**16
