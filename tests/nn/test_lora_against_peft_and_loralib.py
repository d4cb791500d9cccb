"""Equal factors give the outputs of loralib and peft; loralib's adapters load; what both of them lose."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import loralib
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, LoRAError, adapter_state_dict, inject, load_adapter, merge, unmerge
from support.models.layers import same_bits

pytestmark = pytest.mark.core

R, ALPHA = 4, 6
PARTS = {"qkv": [True, False, True]}


# loralib --------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """An embedding, a fused projection and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8, padding_idx=0)
        self.qkv = nn.Linear(8, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.qkv(self.embed(tokens)).tanh())
        return result


class Theirs(Plain):
    """As loralib's users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = loralib.Embedding(13, 8, r=R, lora_alpha=ALPHA, padding_idx=0)
        self.qkv = loralib.MergedLinear(8, 12, r=R, lora_alpha=ALPHA, enable_lora=PARTS["qkv"])
        self.out = loralib.Linear(12, 5, r=R, lora_alpha=ALPHA)
        loralib.mark_only_lora_as_trainable(self)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)


def adapted_plain(theirs: nn.Module, *, merge_weights: bool = False, **options: Any) -> Plain:
    """Our model on loralib's base, with loralib's options."""
    model = Plain().to(next(theirs.parameters()).dtype)
    model.load_state_dict({name: value for name, value in theirs.state_dict().items() if "lora_" not in name})
    defaults = {"r": R, "lora_alpha": ALPHA, "target_modules": ["embed", "qkv", "out"], "enable_lora": PARTS}
    inject(model, LoRAConfig(**defaults | options), merge_weights=merge_weights)
    return model


TOKENS = torch.randint(13, (6, 7), generator=torch.Generator().manual_seed(3))


def test_the_same_outputs_as_loralib_before_and_after_merging() -> None:
    theirs = Theirs().double()
    ours = adapted_plain(theirs)
    plain = copy.deepcopy(ours)
    load_adapter(ours, loralib.lora_state_dict(theirs))
    wanted = theirs(TOKENS)
    assert (plain(TOKENS) - wanted).abs().max() > 0.1
    torch.testing.assert_close(ours(TOKENS), wanted)
    theirs.eval()  # merges
    merge(ours)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS))
    for name in ("embed", "qkv", "out"):
        torch.testing.assert_close(ours.get_submodule(name).weight, theirs.get_submodule(name).weight)
    theirs.train()
    unmerge(ours)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS))


def test_the_same_gradients_as_loralib() -> None:
    """On tokens without padding, where loralib trains B on what padding looks up."""
    theirs = Theirs().double()
    ours = adapted_plain(theirs)
    load_adapter(ours, loralib.lora_state_dict(theirs))
    tokens = TOKENS.clamp(min=1)
    theirs(tokens).square().sum().backward()
    ours(tokens).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)


def test_merge_weights_follows_the_mode_as_loralib_does() -> None:
    theirs = Theirs()
    ours = adapted_plain(theirs, merge_weights=True)
    load_adapter(ours, loralib.lora_state_dict(theirs))
    before = ours.out.weight.clone()
    for training in (False, True, False, True):
        theirs.train(training)
        ours.train(training)
        assert torch.equal(ours.out.weight, before) == training
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_loralibs_state_dict_loads_by_name(bias: str) -> None:
    theirs = Theirs()
    with torch.no_grad():
        theirs.out.bias.add_(1)
    state = loralib.lora_state_dict(theirs, bias=bias)
    ours = adapted_plain(theirs, bias=bias)
    with torch.no_grad():
        ours.out.bias.add_(3)
        wanted = ours.out.bias.clone() if bias == "none" else theirs.out.bias
    assert load_adapter(ours, state) == ["embed", "qkv", "out"]
    assert torch.equal(ours.out.bias, wanted)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in state.items())
    assert {n for n in adapter_state_dict(ours) if "lora_" in n} == {n for n in state if "lora_" in n}


def test_loralibs_whole_state_dict_loads_strictly() -> None:
    theirs, other = Theirs(), Theirs()
    ours = adapted_plain(other)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS))


def test_a_part_of_loralibs_state_dict_is_an_error() -> None:
    state = loralib.lora_state_dict(Theirs())
    ours = adapted_plain(Theirs())
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for name in state:
        with pytest.raises(LoRAError, match=name.rpartition(".")[0]):
            load_adapter(ours, {key: value for key, value in state.items() if key != name})
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("parts", "turned"),
    [([True, True], True), ([True, False, False], False), ([False, True, True, False], False), ([False, True], True)],
)
def test_fused_projection_equals_that_of_loralib(parts: list[bool], turned: bool) -> None:
    """Turned, loralib stores the weight as transformers' Conv1D does."""
    theirs = loralib.MergedLinear(8, 12, r=R, lora_alpha=ALPHA, enable_lora=parts, fan_in_fan_out=turned).double()
    nn.init.normal_(theirs.lora_B)
    ours = nn.Sequential(Conv1D(12, 8) if turned else nn.Linear(8, 12)).double()
    ours[0].load_state_dict({"weight": theirs.weight.contiguous(), "bias": theirs.bias})
    inject(ours, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], enable_lora={"0": parts}))
    load_adapter(ours, {f"0.{name}": value for name, value in loralib.lora_state_dict(theirs).items()})
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.eval()
    merge(ours)
    torch.testing.assert_close(ours(x), theirs(x))


def test_loralibs_convolution_is_refused() -> None:
    theirs = nn.Sequential(loralib.Conv2d(8, 16, 3, r=2, lora_alpha=ALPHA))
    nn.init.normal_(theirs[0].lora_B)
    product = theirs[0].lora_B @ theirs[0].lora_A
    assert torch.linalg.matrix_rank(product.view(16, -1)) > 2  # so no A and B of rank 2 have it
    ours = nn.Sequential(nn.Conv2d(8, 16, 3))
    inject(ours, LoRAConfig(r=2, lora_alpha=ALPHA, target_modules=["0"]))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for state in (loralib.lora_state_dict(theirs), theirs.state_dict()):
        with pytest.raises(LoRAError, match=r"adapter: .*'0\.(conv|lora_)"):
            load_adapter(ours, state)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())

    # Its merged weights are the base.
    x = torch.randn(2, 8, 5, 5)
    wanted = theirs[0](x)
    theirs.eval()
    ours.load_state_dict({"0.weight": theirs[0].conv.weight, "0.bias": theirs[0].conv.bias})
    torch.testing.assert_close(ours(x), wanted)


# peft -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A plain layer, an input for it, and what peft wants to know."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()


PEFT_LAYERS = {
    "linear": Layer(lambda: nn.Linear(8, 6), (3, 5, 8)),
    "rslora": Layer(lambda: nn.Linear(8, 6), (3, 8), (("use_rslora", True),)),
    "Conv1D": Layer(lambda: Conv1D(6, 8), (3, 5, 8), (("fan_in_fan_out", True),)),
    "embedding": Layer(lambda: nn.Embedding(11, 6, padding_idx=2), (3, 5)),
    "conv1d": Layer(lambda: nn.Conv1d(8, 6, 3, padding=2, stride=2), (2, 8, 9)),
    "conv2d": Layer(lambda: nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 8, 7, 7)),
    "conv3d": Layer(lambda: nn.Conv3d(4, 6, 2, stride=2), (2, 4, 6, 6, 6)),
}


class Pair:
    """The same layer adapted by peft and by this package, with the same factors."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        layer = PEFT_LAYERS[name]
        plain = nn.Sequential(layer.build()).to(dtype)
        tokens = isinstance(plain[0], nn.Embedding)
        self.x = torch.randint(11, layer.shape) if tokens else torch.randn(layer.shape).to(dtype)
        self.plain, self.ours = plain, copy.deepcopy(plain)
        options = dict(layer.options)
        config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], **options)
        self.theirs: Any = peft.get_peft_model(copy.deepcopy(plain), config).eval()
        options.pop("fan_in_fan_out", None)
        inject(self.ours, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], **options))
        self.share_new_factors()

    @property
    def their_layer(self) -> Any:
        return self.theirs.base_model.model[0]

    def share_new_factors(self, share: float = 1.0) -> None:
        """Random factors of an adapter of that share of W's norm, for both."""
        layer: Any = self.ours[0]
        kind = "lora_embedding_" if isinstance(layer, nn.Embedding) else "lora_"
        with torch.no_grad():
            for letter in "AB":
                factor = getattr(layer, f"lora_{letter}").normal_()
                if letter == "B":
                    delta = layer.delta(layer.lora_A, layer.lora_B)
                    factor.mul_(share * layer.weight.float().norm() / delta.float().norm())
                theirs = getattr(self.their_layer, f"{kind}{letter}")["default"]
                (theirs.weight if isinstance(theirs, nn.Module) else theirs).copy_(factor)


@pytest.mark.parametrize("name", PEFT_LAYERS)
def test_the_same_outputs_as_peft_before_and_after_merging(name: str) -> None:
    pair = Pair(name, torch.float64)
    assert (pair.plain(pair.x) - pair.theirs(pair.x)).abs().max() > 0.1
    torch.testing.assert_close(pair.ours(pair.x), pair.theirs(pair.x))
    pair.theirs.merge_adapter()
    merge(pair.ours)
    torch.testing.assert_close(pair.ours[0].weight, pair.their_layer.base_layer.weight)
    torch.testing.assert_close(pair.ours(pair.x), pair.theirs(pair.x))
    pair.theirs.unmerge_adapter()
    unmerge(pair.ours)
    torch.testing.assert_close(pair.ours(pair.x), pair.theirs(pair.x))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_bfloat16_weights_drift_with_peft_and_stay_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same cycles, where subtracting the delta does not bring the weights back."""
    monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", 0)  # not by plain copies
    pair = Pair(name, torch.bfloat16)
    weight = pair.plain[0].weight
    for _ in range(20):
        pair.share_new_factors(0.1)
        pair.theirs.merge_adapter()
        pair.theirs.unmerge_adapter()
        merge(pair.ours)
        unmerge(pair.ours)
    assert not same_bits(pair.their_layer.base_layer.weight, weight)
    assert same_bits(pair.ours[0].weight, weight)
