"""Layers that cannot be adapted are refused with the reason, and leave the model as it was."""

from __future__ import annotations

import loralib
import peft
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject
from support.models.networks import Stubborn, Zoo, trace, zoo_config


def _patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


class ForeignLora(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lora_A = nn.Parameter(torch.zeros(1, 4))


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def _parametrized_bias() -> nn.Module:
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


REFUSED = {
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed from others"),
    "parametrized bias": (_parametrized_bias, r"computed from others \(weight_norm, parametrize\)"),
    "old weight_norm": (_old_weight_norm, "computed from others"),
    "forward on the instance": (_patched, "its forward is replaced on the instance of Linear"),
    "integer weight": (_integers, r"its weight is torch\.int8"),
    "foreign lora_A": (ForeignLora, "has a lora_A of another library"),
    "container": (
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(2, 2)),
        r"container\.Sequential cannot be adapted.*'1'",
    ),
    "max_norm": (
        lambda: nn.Embedding(4, 4, max_norm=1.0),
        "max_norm renormalises its rows in place.*set it to",
    ),
    "no weight": (nn.ReLU, r"a torch\.nn\.modules\.activation\.ReLU cannot be adapted, only nn\.Linear, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_cannot_be_adapted_is_refused_with_the_reason_and_no_trace(case):
    build, reason = REFUSED[case]
    model = Stubborn(build())
    before = trace(model)
    targets = ["embed", "body.0", "linear1", "out_proj", "last"]
    with pytest.raises(LoRAError, match=f"inject: 'last': .*{reason}") as caught:
        inject(model, LoRAConfig(target_modules=targets, modules_to_save=["head"]), merge_weights=True)
    assert "exclude_modules=['last']" in str(caught.value)  # the remedy, which works:
    assert trace(model) == before
    config = LoRAConfig(target_modules=targets, modules_to_save=["head"], exclude_modules=["last"])
    assert len(inject(model, config)) == 4


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_layer_anywhere_is_refused_until_it_has_a_shape(make):
    model = nn.Sequential(nn.Linear(4, 4), make())
    before = trace(model)
    with pytest.raises(LoRAError, match=f"'1': the {type(model[1]).__name__} has no shape yet; run one batch"):
        inject(model, LoRAConfig(r=1, target_modules=["0"]))
    assert trace(model) == before
    model(torch.zeros(2, 4))
    assert inject(model, LoRAConfig(r=1, target_modules=["0"])) == ["0"]


@pytest.mark.parametrize("foreign", [lambda: loralib.Linear(4, 4, r=2), lambda: loralib.Conv2d(2, 2, 3, r=2)])
def test_loralib_layers_anywhere_are_refused(foreign):
    model = nn.ModuleDict({"old": foreign(), "new": nn.Linear(4, 4)})
    before = trace(model)
    for targets in (["new"], ["old"], "all-linear", r"old(\.conv)?", ["old.conv", "new"]):
        with pytest.raises(LoRAError, match="adapters of loralib"):
            inject(model, LoRAConfig(target_modules=targets, r=1))
    assert trace(model) == before


def test_peft_layers_anywhere_are_refused():
    model = nn.ModuleDict({"new": nn.Linear(4, 4), "old": nn.Linear(4, 4)})
    peft.LoraModel(model, peft.LoraConfig(target_modules=["old"], r=2), "default")
    before = trace(model)
    with pytest.raises(LoRAError, match=r"adapters of peft at 'old'\. Leave out what put them there, such as get_peft"):
        inject(model, LoRAConfig(target_modules=["new"], r=1))
    with pytest.raises(LoRAError, match=r"Linear already has adapters of peft\. Leave out"):
        inject(model["old"], LoRAConfig(r=1))
    assert trace(model) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["hade"]}, "'hade'"),
        ({"rank_pattern": {"nowhere": 2}}, "'nowhere'"),
        ({"enable_lora": {"body.0": [True, False, True]}}, "3 parts, which do not divide its 8 outputs"),
        ({"enable_lora": {"conv": [True, False]}}, "enable_lora needs a linear layer, not a Conv1d"),
    ],
)
def test_an_option_that_does_not_fit_leaves_no_trace(options, reason):
    model = Zoo()
    before = trace(model)
    with pytest.raises(LoRAError, match=reason):
        inject(model, zoo_config(**options), merge_weights=True)
    assert trace(model) == before


class Own(nn.Module):
    """A layer of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_a_replaced_forward_is_refused_where_a_parameter_is_adapted():
    model = nn.ModuleDict({"own": Own(), "fc": nn.Linear(3, 3)})
    model["own"].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(LoRAError, match=r"'own\.weight': its forward is replaced on the instance of Own"):
        inject(model, LoRAConfig(target_modules=["fc"], target_parameters=["own.weight"]))


def test_a_module_with_a_tie_inside_is_trained_whole():
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    head[1].weight = head[0].weight
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": head})
    inject(model, LoRAConfig(r=1, modules_to_save=["head"]))
    assert [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("head")] == [
        *("head.0.weight", "head.0.bias", "head.1.bias")
    ]


def test_parameters_of_whole_numbers_stay_frozen_where_their_module_is_trained():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].steps = nn.Parameter(torch.tensor([3]), requires_grad=False)
    inject(model, LoRAConfig(r=1, modules_to_save=["head"]))
    assert model["head"].weight.requires_grad
    assert not model["head"].steps.requires_grad
