"""Single parameters that are adapted: against W + s * B @ A in float64, merged and restored, copied, refused."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    unload,
    unmerge,
)
from lightning_lora.model import merging
from lightning_lora.nn.adapted_module import adapted_layers
from support.covering import covering
from support.models.layers import same_bits
from support.models.pair_checks import by_pickle
from support.models.parameters import CASES, Experts, Model, Projected, Recurrent, fill_factors_, make_subject

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize(("name", "dtype"), covering([*CASES], [torch.float64, torch.float32], meet=1))
def test_output_and_gradients_are_those_of_w_plus_delta_merged_or_not(name: str, dtype: torch.dtype):
    subject = make_subject(name, dtype)
    assert len(adapted_layers(subject.model)) == CASES[name].adapted
    factors = {key: value.double().clone().requires_grad_() for key, value in subject.factors().items()}
    reference, found = subject.reference(factors), subject.model(subject.x)
    digits = 1e-12 if dtype == torch.float64 else 1e-5
    close = {"rtol": digits, "atol": digits * float(reference.detach().abs().max())}
    assert not torch.allclose(subject.plain(subject.x).double(), reference, **close)
    torch.testing.assert_close(found.double(), reference, **close)
    reference.square().sum().backward()
    found.square().sum().backward()
    for key, factor in factors.items():
        gradient = subject.model.get_parameter(key).grad
        torch.testing.assert_close(gradient.double(), factor.grad, rtol=digits, atol=digits * float(factor.grad.norm()))
    base = [p for key, p in subject.model.named_parameters() if "lora_" not in key]
    assert not any(p.requires_grad or p.grad is not None for p in base)
    with merged(subject.model):
        torch.testing.assert_close(subject.model(subject.x).double(), reference, **close)


@pytest.mark.parametrize("name", ["lstm, projected, both ways", "transposed experts"])
def test_merged_weights_are_rounded_once(name: str):
    subject = make_subject(name, torch.bfloat16)
    plain = {key: value.double() for key, value in subject.plain.named_parameters()}
    found = merged_state_dict(subject.model)
    assert found.keys() == subject.plain.state_dict().keys()
    merge(subject.model)
    for key, value in found.items():
        assert same_bits(value, subject.model.get_parameter(key))
        if key in adapted_layers(subject.model):
            error = (value.double() - plain[key]).norm() / plain[key].norm()
            assert error > 0.01


@pytest.mark.parametrize("name", ["lstm", "experts"])
def test_a_merged_model_shows_w_and_takes_a_new_base(name: str):
    subject = make_subject(name)
    model = subject.model
    base = {key: value.clone() for key, value in subject.plain.state_dict().items()}
    with merged(model):
        state = model.state_dict()
        assert all(same_bits(state[key], value) for key, value in base.items())
        model.load_state_dict({key: value + 1 for key, value in base.items()})
    assert all(same_bits(model.state_dict()[key], value + 1) for key, value in base.items())


def test_a_copy_of_a_merged_recurrent_layer_runs_on_its_own_weights(monkeypatch):
    monkeypatch.setattr(merging, "COPY_BUDGET", 0)  # so that values are kept for restoring
    subject = make_subject("lstm")
    output = subject.model(subject.x)
    merge(subject.model)
    for twin in (copy.deepcopy(subject.model), by_pickle(subject.model)):
        unmerge(twin)
        assert torch.equal(twin(subject.x), output)
        fill_factors_(twin)
        assert not torch.equal(twin(subject.x), output)
    unmerge(subject.model)
    assert torch.equal(subject.model(subject.x), output)


@pytest.mark.parametrize("name", ["lstm, packed", "experts", "weight of a linear layer"])
def test_what_leaves_the_adapter_out_is_the_plain_model(name: str):
    subject = make_subject(name)
    model, x = subject.model, subject.x
    with disable_adapter(model):
        assert torch.equal(model(x), subject.plain(x))
    twin = copy.deepcopy(model)
    output = merge_and_unload(twin)(x)
    torch.testing.assert_close(output, model(x))
    unload(model)
    for plain in (twin, model):
        assert [type(module) for module in plain.modules()] == [type(module) for module in subject.plain.modules()]
        assert list(plain.state_dict()) == list(subject.plain.state_dict())
        assert not any(key.startswith("lora") for module in plain.modules() for key in vars(module))
    assert torch.equal(model(x), subject.plain(x))


def test_names_and_objects_of_the_base_stay():
    plain = Model(Recurrent(nn.LSTM))
    modules, parameters = list(plain.named_modules()), dict(plain.named_parameters())
    inject(plain, LoRAConfig(target_modules=[], target_parameters=["weight_ih_l0"]))
    assert list(plain.named_modules()) == modules
    assert isinstance(plain.inner.rnn, nn.LSTM)
    now = dict(plain.named_parameters())
    assert all(now[key] is parameter for key, parameter in parameters.items())
    assert now.keys() - parameters.keys() == {"inner.rnn.lora_A_weight_ih_l0", "inner.rnn.lora_B_weight_ih_l0"}


def test_a_recurrent_layer_never_flattens_its_weights_again(monkeypatch):
    subject = make_subject("lstm")
    calls = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: calls.append(self))
    for _ in range(3):
        subject.model(subject.x).sum().backward()
        with merged(subject.model):
            subject.model(subject.x)
    assert not calls


def test_weights_are_back_after_a_forward_that_fails():
    subject = make_subject("lstm")
    rnn = subject.model.inner.rnn
    with pytest.raises(RuntimeError):
        subject.model(torch.randn(2, 4, 9))
    assert all(w is rnn._parameters[key] for w, key in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True))
    experts = make_subject("experts")
    with pytest.raises(RuntimeError):
        experts.model(torch.randn(2, 4, 9))
    assert isinstance(experts.model.inner.gate_up_proj, nn.Parameter)


def test_another_thread_runs_after_one_whose_adapter_failed(monkeypatch):
    subject = make_subject("experts")
    layer = next(iter(adapted_layers(subject.model).values()))
    monkeypatch.setattr(layer, "effective_factors", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        subject.model(subject.x)
    monkeypatch.undo()
    outputs: list[torch.Tensor] = []
    thread = Thread(target=lambda: outputs.append(subject.model(subject.x)), daemon=True)
    thread.start()
    thread.join(10)
    assert len(outputs) == 1


def test_layers_and_parameters_are_adapted_side_by_side():
    model = nn.ModuleDict({"rnn": nn.GRU(5, 6, batch_first=True), "head": nn.Linear(6, 2)})
    names = inject(model, LoRAConfig(target_modules=["head"], target_parameters=["rnn.weight_hh_l0"]))
    assert names == ["rnn.weight_hh_l0", "head"]


def test_a_tied_parameter_stays_factored_and_changes_nobody_else():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["table"].weight
    model["free"] = Projected()
    options: dict[str, Any] = {"target_modules": [], "init_lora_weights": False}
    inject(model, LoRAConfig(target_parameters=["table.weight", "projection"], **options))
    tokens, x = torch.arange(6), torch.randn(3, 4)
    before = model["table"](tokens), model["head"](x)
    assert not torch.equal(before[0], model["head"].weight)
    with merged(model):
        assert bool(adapted_layers(model)["free.projection"].lora.undo)
        assert torch.equal(model["table"](tokens), before[0])
        assert torch.equal(model["head"](x), before[1])
    with pytest.raises(LoRAError, match=r"cannot express the adapter of 'table\.weight': its weight is also head"):
        merged_state_dict(model)
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())
    assert "table.weight" in merged_state_dict(model)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no such parameter": (Projected, {"target_parameters": ["projecton"]}, "did you mean 'projection'"),
    "a vector": (lambda: nn.LSTM(5, 6), {"target_parameters": ["bias_ih_l0"]}, "no parameter of two or three"),
    "a layer that is adapted": (
        lambda: nn.Linear(5, 6),
        {"target_modules": ["inner"], "target_parameters": ["inner.weight"]},
        "it is in target_modules too",
    ),
    "integers": (
        lambda: Fixed(nn.Parameter(torch.zeros(3, 4, dtype=torch.uint8), requires_grad=False)),
        {"target_parameters": ["weight"]},
        r"its weight is torch\.uint8",
    ),
    "a transposed view": (
        lambda: Fixed(nn.Parameter(torch.randn(3, 4).T)),
        {"target_parameters": ["weight"]},
        "do not follow each other in memory",
    ),
    "a reader": (
        lambda: Reader(),
        {"target_modules": ["linear"], "target_parameters": ["scale"]},
        "reads the weight of the adapted layer 'linear'",
    ),
}


class Fixed(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 5), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.scale @ self.linear.weight


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_nothing_is_changed(case: str):
    build, options, message = REFUSED[case]
    model = Model(build())
    before = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(LoRAError, match=message):
        inject(model, LoRAConfig(**{"target_modules": []} | options))
    assert ([type(module) for module in model.modules()], list(model.state_dict())) == before


def test_dropout_is_refused_with_parameters_and_a_module_of_parameters_names_them():
    with pytest.raises(LoRAError, match="lora_dropout must be 0 with target_parameters"):
        LoRAConfig(target_modules=[], target_parameters=["w"], lora_dropout=0.1)
    with pytest.raises(LoRAError, match=r"target_modules: \[\] adapts no layer, and nothing else is trained"):
        inject(Model(Experts()), LoRAConfig(target_modules=[]))
    with pytest.raises(LoRAError, match=r"target_parameters=\['inner.gate_up_proj', 'inner.down_proj'\]"):
        inject(Model(Experts()), LoRAConfig(target_modules=["inner"]))


class LSTMWithMore(nn.LSTM):
    """Has a parameter beside those of nn.LSTM."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.extra = nn.Parameter(torch.eye(4))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x @ self.extra)


def test_a_parameter_that_a_subclass_of_lstm_adds_is_adapted_beside_those_of_lstm():
    torch.manual_seed(0)
    model, x = nn.Sequential(LSTMWithMore()), torch.randn(3, 2, 4)
    inject(model, LoRAConfig(r=2, target_parameters=["0.extra", "0.weight_hh_l0"], init_lora_weights=False))
    output = model(x)[0]
    with merged(model):
        torch.testing.assert_close(output, model(x)[0])
    output.sum().backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if "lora" in name)


def test_a_forward_that_cannot_put_weights_in_leaves_nothing_locked(monkeypatch: pytest.MonkeyPatch):
    model, x = nn.Sequential(nn.LSTM(4, 4)), torch.randn(3, 2, 4)
    inject(model, LoRAConfig(r=2, target_parameters=["0.weight_hh_l0"], init_lora_weights=False))
    expected = model(x)[0]

    def fail(values: Any) -> None:
        raise ValueError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(model[0], "lora_put", fail)
        with pytest.raises(ValueError, match="out of luck"):
            model(x)
    assert torch.equal(model(x)[0], expected)
    with merged(model):
        torch.testing.assert_close(model(x)[0], expected)
