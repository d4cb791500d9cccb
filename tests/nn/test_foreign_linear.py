"""Linear layers of other libraries: y = their own forward + s * B(A(x)), and what cannot be a linear layer is named."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_stats,
    disable_adapter,
    inject,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    summary,
    unload,
)
from lightning_lora.nn.foreign_linear import LoRAForeignLinear
from lightning_lora.nn.lora import LoRA
from support.covering import covering
from support.models.foreign import FOREIGN, INPUTS, WIDTH, QuantLinear, TELinear, WQLinear, inputs, network
from support.models.layers import same_bits

R, ALPHA = 2, 3.0
TARGETS = ["0", "2"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}


def fill_(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def adapted(kind: str = "GPTQ", **options: Any) -> Any:
    model = network(kind)
    inject(model, LoRAConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS} | options))
    return fill_(model)


class Holder(nn.Module):
    """One foreign layer, whose outputs are multiplied before."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(INPUTS, INPUTS), layer

    def forward(self, *args: Any, **options: Any) -> Any:
        x, *others = args
        return self.layer(self.first(x), *others, **options)


def held(layer: Any, targets: tuple[str, ...] = ("layer",), **options: Any) -> Any:
    inject(model := Holder(layer), LoRAConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": targets} | options))
    return fill_(model)


# --- what it computes ---


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "rslora"),
    covering([*FOREIGN], DTYPES, [(INPUTS,), (5, INPUTS), (2, 3, INPUTS)], [False, True], meet=1),
)
def test_outputs_and_gradients_agree_with_float64(kind: str, dtype: torch.dtype, shape: Any, rslora: bool) -> None:
    torch.manual_seed(2)
    layer = FOREIGN[kind](nn.Linear(INPUTS, WIDTH))
    model = nn.Sequential(layer.to(dtype) if kind == "TE" else layer)
    x = torch.randn(shape).to(torch.float16 if kind == "AWQ" else dtype).to(dtype)
    plain = model(x)
    inject(model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], use_rslora=rslora))
    assert torch.equal(model(x), plain)
    fill_(model)
    a, b = (factor.detach().double().requires_grad_() for factor in (model[0].lora_A, model[0].lora_B))
    s = ALPHA / (R**0.5 if rslora else R)
    wide = x.double().requires_grad_()
    wanted = plain.double() + s * F.linear(F.linear(wide, a), b)
    x.requires_grad_()
    found = model(x)
    assert found.dtype == dtype
    least = TOLERANCE[dtype if model[0].lora_A.dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(
        found.double(), wanted, rtol=(allowed := max(least, TOLERANCE[dtype])), atol=10 * allowed
    )
    upstream = torch.randn(found.shape, dtype=torch.float64)
    found.backward(upstream.to(dtype))
    (wanted + F.linear(wide, layer.values().double())).backward(upstream)
    tolerance = {"rtol": allowed, "atol": 100 * allowed}
    for factor, reference in ((model[0].lora_A, a), (model[0].lora_B, b)):
        torch.testing.assert_close(factor.grad.double(), reference.grad, **tolerance)
    of_input = max(1e-2, allowed) if kind == "AWQ" else allowed  # its backward is in half precision
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=of_input, atol=100 * of_input)


def test_a_merged_model_keeps_such_layers_factored_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = adapted(target_modules=[*TARGETS, "4"]), inputs()
    wanted, weight = model(x), model[4].weight.clone()
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        for _ in range(2):
            with merged(model):
                torch.testing.assert_close(model(x), wanted)
                assert not torch.equal(model[4].weight, weight)
            assert same_bits(model[4].weight, weight)
            assert torch.equal(model(x), wanted)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "QuantLinear" in said


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_base_is_there_while_the_adapter_is_off_and_after_unload_and_copies_are_equal(kind: str) -> None:
    plain, model, x = network(kind).train(), adapted(kind).train(), inputs()
    wanted, classes, found = plain(x), [type(layer) for layer in plain], model(x)
    with disable_adapter(model):
        assert torch.equal(model(x), wanted)
    assert not torch.equal(found, wanted)
    merge(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), found)
        assert type(again[0]) is type(model[0])
    unload(model)
    assert [type(layer) for layer in model] == classes
    assert torch.equal(model(x), wanted)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
def test_a_compiled_model_computes_the_same_in_one_graph() -> None:
    model, x = adapted().eval(), inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].lora_A.grad is not None


def test_a_cast_model_keeps_float32_factors_and_a_double_one_gets_double_factors() -> None:
    model = adapted("TE").to(torch.bfloat16)
    assert {model[0].lora_A.dtype, model[0].weight.dtype} == {torch.float32, torch.bfloat16}
    wide = network("TE").double()
    inject(wide, LoRAConfig(r=R, target_modules=TARGETS))
    assert wide[0].lora_A.dtype == torch.float64


# --- what it says of itself ---


def test_statistics_and_summary_know_no_norm_of_the_weight() -> None:
    model = adapted()
    model(inputs()).sum().backward()
    (group,) = adapter_stats(model).groups.values()
    assert group.layers == 2
    assert group.norm is None
    assert "norm" not in group.to_dict()
    assert group.rank is not None
    assert 1 <= group.rank <= R
    assert group.gradients["A"] > 0
    report = summary(model)
    assert (report.layers, report.groups[0].kind) == (2, "QuantLinear")
    assert len(report.unmerged) == 1
    assert not report.also_saved


@pytest.mark.parametrize("verb", [merged_state_dict, merge_and_unload])
def test_plain_merged_weights_are_refused_by_name(verb: Any) -> None:
    model, x = adapted(), inputs()
    wanted = model(x)
    with pytest.raises(LoRAError, match=r"'0': it is a QuantLinear"):
        verb(model)
    assert torch.equal(model(x), wanted)


def test_all_linear_lists_such_layers_to_copy(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.ModuleDict({"q": network()[0], "k": network()[2]}), nn.ModuleDict({"q": network()[0]}))
    model.append(nn.Linear(3, 3))
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        assert inject(model, LoRAConfig(target_modules="all-linear")) == ["2"]
    assert sum("target_modules=['q', 'k']" in record.getMessage() for record in caplog.records) == 1
    unload(model)
    assert inject(model, LoRAConfig(target_modules=["q", "k"])) == ["0.q", "0.k", "1.q"]


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        ({"exclude_modules": ["0"]}, "target_modules=['2']"),
        ({"use_dora": True}, ""),
    ],
)
def test_the_list_holds_what_can_be_adapted_and_no_more(options: Any, listed: str, caplog: Any) -> None:
    model = network("TE")
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(model, LoRAConfig(r=R, **options))
    said = [record.getMessage() for record in caplog.records if "target_modules=" in record.getMessage()]
    assert len(said) == bool(listed)
    assert all(listed in line for line in said)


# --- what is refused ---


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPTQ", {"use_dora": True}),
        ("AWQ", {"init_lora_weights": "pissa"}),
        ("HQQ", {"init_lora_weights": "lora_ga"}),
        ("TE", {"variant": "loha"}),
        ("GPTQ", {"enable_lora": {"2": [True, False]}}),
    ],
)
def test_what_reads_the_weight_is_refused_by_name(kind: str, options: Any) -> None:
    model = network(kind)
    with pytest.raises(LoRAError, match=rf"'2': {next(iter(options))}.*Linear.*exclude_modules=\['2'\]"):
        inject(model, LoRAConfig(r=R, target_modules=["2"], **options))
    assert not any("lora" in name for name in model.state_dict())


def test_a_bias_that_is_no_parameter_cannot_be_trained_and_one_that_is_can() -> None:
    bias: Any = "all"
    with pytest.raises(LoRAError, match=r"'0': the bias of the QuantLinear.*bias='none'"):
        inject(network(), LoRAConfig(target_modules=["0"], bias=bias))
    model = network("TE")
    inject(model, LoRAConfig(target_modules=["0"], bias=bias))
    assert model[0].bias.requires_grad
    without = nn.Sequential(QuantLinear(nn.Linear(INPUTS, WIDTH, bias=False)))
    assert inject(without, LoRAConfig(target_modules=["0"], bias=bias)) == ["0"]


class Halving(QuantLinear):
    """Gives half of the outputs, as a layer that is split over ranks does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[..., : self.out_features // 2]


def gathering() -> TELinear:
    """A layer that takes a part of in_features, as one whose input is split does."""
    layer = TELinear(INPUTS, WIDTH)
    layer.in_features = 2 * INPUTS
    return layer


@pytest.mark.parametrize(
    ("layer", "options", "found"),
    [
        (lambda: TELinear(INPUTS, WIDTH, return_bias=True), {}, "a tuple"),
        (lambda: Halving(nn.Linear(INPUTS, WIDTH)), {}, r"\(5, 12\)"),
        (gathering, {}, r"maps \(5, 16\) to"),
        (lambda: TELinear(INPUTS, WIDTH), {"is_first_microbatch": True}, "one input"),
    ],
)
def test_two_inputs_two_outputs_and_other_shapes_are_refused_by_name(layer: Any, options: Any, found: str) -> None:
    model = held(layer())
    with pytest.raises(LoRAError, match=rf"'layer': .*{found}"):
        model(inputs(), **options)
    with disable_adapter(model):
        model(inputs(), **options)


def test_a_layer_that_gives_its_input_no_gradient_is_refused_in_training() -> None:
    model = held(WQLinear(nn.Linear(INPUTS, WIDTH)), targets=("first", "layer"))
    assert model.eval()(inputs()).shape == (5, WIDTH)
    with torch.no_grad():
        model.train()(inputs())
    model.train()(inputs()).sum().backward()
    assert model.first.lora_A.grad.abs().sum() > 0

    class Blind(WQLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    blind = held(Blind(nn.Linear(INPUTS, WIDTH)), targets=("first", "layer"))
    with pytest.raises(LoRAError, match=r"'layer': the Blind gives its input no gradient.*model\.train\(\)"):
        blind.train()(inputs())
    alone = held(Blind(nn.Linear(INPUTS, WIDTH)))  # nothing before it is trained
    alone.train()(inputs()).sum().backward()
    assert alone.layer.lora_A.grad is not None
    with torch.no_grad():  # nobody asks for a gradient
        alone.layer(torch.randn(5, alone.layer.weight_shape()[1], requires_grad=True))


def test_a_variant_that_scales_the_weights_outputs_is_refused_by_name() -> None:
    """Also one that stores A and B alone."""

    class Scaled(LoRA):
        has_scale = True

    assert LoRAForeignLinear.takes(LoRA())
    assert not LoRAForeignLinear.takes(Scaled())
