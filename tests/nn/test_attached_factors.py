"""Attached adapters in each kind of layer, against a float64 reference: forwards, gradients, W' and its bits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, attach, detach, inject, merge, merged_state_dict, take_adapter, unmerge
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.nn.attached_factors import AttachedFactors, Packed
from support.covering import covering
from support.models import parameters
from support.models.layers import ALPHA, CASES, DTYPES, Attention, R, Subject, as_bits, make_subject, matrix, rounding

KINDS = [
    *("linear", "linear, one vector", "activated linear", "linear of another library", "transformers Conv1D"),
    *("fused, outer parts", "embedding, padding", "conv1d, unbatched", "conv2d, circular", "conv2d, depthwise"),
    *("conv3d, groups", "conv that pads", "dora, linear", "dora, embedding, padding", "dora, conv2d"),
]
OTHERS = {"first": (2, 0.8), "second": (4, -0.5)}  # rank and weight
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def other(plain: Any, name: str, case: Any) -> Adapter:
    """A filled adapter of another rank on the same base."""
    model = copy.deepcopy(plain)
    rank = OTHERS[name][0]
    inject(model, LoRAConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=False), seed=rank)
    return take_adapter(model)


def changes(plain: Any, others: dict[str, Adapter], size: Any = torch.clone) -> torch.Tensor:
    """The sum of w_i * s_i * B_i @ A_i, with s = 1, as the layer stores it."""
    total = torch.zeros(plain.layer.weight.shape, dtype=torch.float64)
    for name, adapter in others.items():
        a, b = (size(adapter.tensors[f"layer.lora_{leaf}"].double()) for leaf in "AB")
        weight = OTHERS[name][1] if size is torch.clone else abs(OTHERS[name][1])
        total += weight * matrix(plain.layer, a, b, None).reshape(total.shape)
    return total


class Wide(Subject):
    """The reference with more on top of its weight."""

    others: dict[str, Adapter]

    def answer(self, *, magnitudes: bool = False, trained: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size = torch.Tensor.abs if magnitudes else torch.clone
        wide = copy.deepcopy(self.plain).double()
        if isinstance(wide.layer, nn.Embedding):
            wide.layer.sparse = False
        state = {name: size(value.detach()) for name, value in wide.named_parameters()}
        leaves: dict[str, torch.Tensor] = {}
        weight = state["layer.weight"]
        if trained:
            leaves = {leaf: getattr(self.layer, f"lora_{leaf}").detach().double().requires_grad_() for leaf in "AB"}
            delta = ALPHA / R * matrix(self.plain.layer, size(leaves["A"]), size(leaves["B"]), self.case.parts)
            weight = (weight + delta.reshape(weight.shape)) * self.scale()
        state["layer.weight"] = weight + changes(self.plain, self.others, size)
        x = self.x if self.case.tokens else size(self.x.double())
        return functional_call(wide, state, (x,)), leaves


def subject_of(name: str, dtype: torch.dtype) -> Wide:
    subject = make_subject(name, dtype)
    found = Wide(subject.model, subject.plain, subject.x, subject.case)
    found.others = {each: other(found.plain, each, found.case) for each in OTHERS}
    return found


def attach_(model: nn.Module, others: dict[str, Adapter]) -> None:
    for name, adapter in others.items():
        assert attach(model, adapter, name=name, strength=OTHERS[name][1]) == ["layer"]


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    allowed = rounding(found.dtype, bound) * (1 if found.dtype in (torch.float16, torch.bfloat16) else 4)
    assert ((found.detach().double() - expected.detach()).abs() <= allowed + 1e-30).all()


@pytest.mark.parametrize(("name", "dtype"), covering(KINDS, DTYPES, meet=1))
def test_a_kind_of_layer_adds_what_is_beside(name: str, dtype: torch.dtype):
    subject = subject_of(name, dtype)
    attach_(subject.model, subject.others)
    expected, leaves = subject.answer()
    bound, _ = subject.answer(magnitudes=True)
    found = subject.model(subject.x)
    assert_near(found, expected, bound)
    with torch.no_grad():
        assert_near(subject.model(subject.x), expected, bound)
    if dtype is torch.float64:
        signs = torch.randn(expected.shape, dtype=torch.float64)
        gradients = torch.autograd.grad((expected * signs).sum(), [*leaves.values()])
        (found * signs).sum().backward()
        for leaf, gradient in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(getattr(subject.layer, f"lora_{leaf}").grad.double(), gradient)


@pytest.mark.parametrize(("name", "dtype"), covering([n for n in KINDS if CASES[n].merges], DTYPES, meet=1))
def test_merging_rounds_all_of_them_once_and_unmerging_brings_every_bit_back(name: str, dtype: torch.dtype):
    subject = subject_of(name, dtype)
    before, weight = as_bits(subject.layer.weight).clone(), subject.layer.weight.detach().double()
    attach_(subject.model, subject.others)
    a, b = (getattr(subject.layer, f"lora_{leaf}").detach().double() for leaf in "AB")
    own = ALPHA / R * matrix(subject.plain.layer, a, b, subject.case.parts).reshape(weight.shape)
    exact = (weight + own) * subject.scale() + changes(subject.plain, subject.others)
    state = merged_state_dict(subject.model)
    merge(subject.model)
    assert torch.equal(as_bits(state["layer.weight"]), as_bits(subject.layer.weight))
    found = subject.layer.weight.detach()
    if "use_dora" in subject.case.options:  # its c is rounded before
        torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    else:
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert ((found.double() - exact).abs() <= spacing / 2 * (1 + 1e-6) + 1e-14).all()
    unmerge(subject.model)
    assert torch.equal(as_bits(subject.layer.weight), before)


@pytest.mark.parametrize("name", [name for name in KINDS if "dora" not in name])
def test_it_acts_alone_in_a_plain_layer_which_detaching_leaves_behind(name: str):
    subject = subject_of(name, torch.float32)
    model = copy.deepcopy(subject.plain)
    attach_(model, subject.others)
    expected, _ = subject.answer(trained=False)
    bound, _ = subject.answer(magnitudes=True, trained=False)
    assert_near(model(subject.x), expected, bound)
    assert model.state_dict().keys() == subject.plain.state_dict().keys()
    for each in OTHERS:
        detach(model, each)
    assert torch.equal(model(subject.x), subject.plain(subject.x))
    assert type(model.layer) is type(subject.plain.layer)
    assert vars(model).keys() == vars(subject.plain).keys()


@pytest.mark.parametrize("name", ["lstm, projected, both ways", "gru, packed", "transposed experts", "matrix"])
def test_it_acts_in_single_parameters(name: str):
    case = parameters.CASES[name]
    torch.manual_seed(1)
    plain = parameters.Model(case.build()).requires_grad_(False)
    options: Any = {"target_modules": [], "target_parameters": case.targets, "init_lora_weights": False}
    models = {}
    for seed, rank in enumerate((1, 2, 3)):
        models[rank] = copy.deepcopy(plain)
        inject(models[rank], LoRAConfig(r=rank, **options), seed=seed)
    torch.manual_seed(2)
    x, state = torch.randn(2, 4, 5), plain.state_dict()
    total = {name: value.clone() for name, value in state.items()}
    for model in models.values():
        for name, value in merged_state_dict(model).items():
            total[name] += value - state[name]
    expected = functional_call(plain, total, (x,))
    for rank in (1, 2):
        assert len(attach(models[3], take_adapter(models[rank]), name=str(rank))) == case.adapted
    torch.testing.assert_close(models[3](x), expected, rtol=1e-4, atol=1e-5)
    before = {name: as_bits(value).clone() for name, value in models[3].named_parameters()}
    merge(models[3])
    torch.testing.assert_close(models[3](x), expected, rtol=1e-4, atol=1e-5)
    unmerge(models[3])
    assert all(torch.equal(as_bits(value), before[name]) for name, value in models[3].named_parameters())
    for rank in (1, 2):
        attach(plain, take_adapter(models[rank]), name=str(rank))
    detach(plain, "2")
    alone = models[1](x)
    torch.testing.assert_close(plain(x), alone, rtol=1e-4, atol=1e-5)


def pair(rank: int, seed: int, weight: float = 1.0) -> AttachedFactors:
    stream = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 5, generator=stream), torch.randn(4, rank, generator=stream)
    return AttachedFactors(a, b, 2.0 / rank, weight)


def test_transforms_of_torch_take_it_as_a_forward_does():
    def filled(seed: int, targets: list[str]) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        inject(model, LoRAConfig(r=2, target_modules=targets, init_lora_weights=False), seed=seed)
        return model

    model, x = filled(1, ["0"]), torch.randn(3, 8)
    attach(model, take_adapter(filled(2, ["0", "2"])), name="x")
    expected = model(x)
    torch.testing.assert_close(torch.func.vmap(model)(x), expected)
    tangent = torch.randn(3, 8)
    _, found = torch.func.jvp(model, (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.functional.jvp(model, leaf, tangent)[1]
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(expected, filled(1, ["0"])(x))


def test_packed_pairs_have_the_order_of_their_names_and_are_taken_apart_bit_for_bit():
    pairs = {"b": pair(2, 1), "a": pair(3, 2, 0.5)}
    packed, turned = Packed(pairs), Packed(dict(reversed(pairs.items())))
    assert list(packed.shares) == ["a", "b"]
    place = torch.device("cpu")
    assert all(torch.equal(*each) for each in zip(packed.factors(place), turned.factors(place), strict=True))
    for name, each in packed.unpacked().items():
        assert torch.equal(each.a, pairs[name].a)
        assert torch.equal(each.b, pairs[name].b)
        assert (each.scaling, each.strength) == (pairs[name].scaling, pairs[name].strength)


def test_a_weight_is_written_into_copies_on_other_devices_too_which_a_pickle_leaves_out():
    packed, other = Packed({"a": pair(3, 2), "b": pair(2, 1)}), torch.device("cuda:7")
    memory, before = packed.scales.data_ptr(), packed.factors(torch.device("cpu"))[1].clone()
    packed.copies[other] = (packed.a.clone(), packed.b.clone(), packed.scales.clone())
    packed.set_strength_("b", 0.0)
    assert packed.scales.data_ptr() == memory
    assert packed.scales.tolist() == packed.copies[other][2].tolist() == pytest.approx([2 / 3] * 3 + [0, 0])
    packed.set_strength_("b", 1.0)
    assert torch.equal(packed.factors(torch.device("cpu"))[1], before)
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again.a, packed.a)
    assert not again.copies


def test_moves_keep_values_and_dtype():
    packed = Packed({"a": pair(3, 2)})
    a = packed.a
    packed.move_(lambda tensor: tensor.half())
    packed.move_(lambda tensor: torch.empty_like(tensor, device="cpu"))  # to_empty
    packed.move_(lambda tensor: tensor.to("meta"))
    assert torch.equal(packed.a, a)
    assert packed.factors(torch.device("meta"))[0].is_meta
    assert not packed.copies


class Reading(nn.Module):
    """Reads the weight of its layer instead of calling it, and calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.called(nn.functional.linear(x, self.linear.weight, self.linear.bias).tanh())
        return result


class Tied(nn.Module):
    """One module under two names, and a table that is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = nn.Linear(8, 8)
        self.head, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.last.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.head(self.two(self.one(x).tanh()).tanh()).tanh())
        return result


def untied(model: Any) -> Any:
    if isinstance(model, Tied):
        model.last.weight = nn.Parameter(model.last.weight.detach().clone())
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


USERS: dict[str, tuple[Any, list[str], list[str]]] = {  # model, what is trained, what is attached
    "attention, output trained": (Attention, ["attention.out_proj"], ["attention"]),
    "attention, output attached": (Attention, ["attention"], ["attention.out_proj"]),
    "attention, three weights": (lambda: Attention(kdim=6, vdim=5), ["attention"], ["attention"]),
    "transformer": (encoder, ["linear1"], ["self_attn", "linear2", "linear1"]),
    "reader, trained": (Reading, ["linear"], ["linear", "called"]),
    "shared": (Tied, ["one"], ["one", "head"]),
}


@pytest.mark.parametrize(("name", "first"), covering([*USERS], ["attached", "injected"], meet=1))
def test_it_acts_wherever_a_model_uses_a_weight(name: str, first: str):
    build, targets, others = USERS[name]

    def fresh() -> Any:
        torch.manual_seed(1)
        return build().eval()

    def changed(targets: list[str], seed: int, model: Any) -> Any:
        options: Any = {"exclude_modules": ["out_proj"]} if name.endswith("output attached") and seed == 1 else {}
        inject(model, LoRAConfig(r=2, target_modules=targets, init_lora_weights=False, **options), seed=seed)
        return model

    x, adapter = torch.linspace(-1, 1, 64).view(2, 4, 8), take_adapter(changed(others, 2, fresh()))
    plain = untied(fresh())
    state = {key: -value for key, value in plain.state_dict().items()}
    for targets_of, seed in ((targets, 1), (others, 2)):
        for key, value in merged_state_dict(changed(targets_of, seed, untied(fresh()))).items():
            state[key] = state[key] + value
    plain.load_state_dict(state)
    expected = plain(x)
    model = fresh()
    if first == "injected":
        changed(targets, 1, model)
    attach(model, adapter, name="x")
    if first == "attached":
        changed(targets, 1, model)
    for mode in (False, True):
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    before = model(x)
    merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(x), before)
    detach(model, "x")
    assert torch.equal(model(x), changed(targets, 1, fresh())(x))
