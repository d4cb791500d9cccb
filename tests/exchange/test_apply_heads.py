"""Two tasks on one base with heads of other sizes, a strength beside a trained head, and a base of another width."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    inject,
    load_adapter,
    merge,
    merged_state_dict,
    read_adapter,
    scaled,
    take_adapter,
    unload,
)
from lightning_lora.adapter.adapter import Adapter

SIZES = {"three": 3, "ten": 10}


def network(classes: int = 3, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(4, width), "head": nn.Linear(width, classes)})
    nn.init.constant_(model["head"].bias, 0.5)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    return model.head(model.body(torch.ones(2, 4)).relu())


def trained(classes: int, r: int = 2) -> tuple[Adapter, torch.Tensor]:
    """An adapter with a trained head, and what the model computes with it."""
    inject(
        model := network(classes),
        LoRAConfig(r=r, target_modules=["body"], modules_to_save=["head"], init_lora_weights=False),
    )
    with torch.no_grad():
        model.head.weight.add_(1)
    return take_adapter(model), outputs(model)


def line_in(error: BaseException) -> str:
    """The statement that an error advises."""
    found = re.search(r"first, (model\.\S+ = .*|model\.set_submodule\(.*\)), and then", str(error))
    assert found, str(error)
    return found[1]


@pytest.mark.parametrize("state", ["new", "adapted", "merged", "combined"])
def test_an_adapter_with_a_head_of_another_size_names_the_line_that_makes_room_for_it(state: str):
    (three, of_three), (ten, of_ten) = trained(3), trained(10, r=4)
    model = network(3)
    if state != "new":
        load_adapter(model, combine([three, three], [0.5, 0.5]) if state == "combined" else three)
    merge(model) if state == "merged" else None
    with pytest.raises(LoRAError, match=r"'head' was fully trained with another size.*\(3, 8\).*\(10, 8\)") as caught:
        load_adapter(model, ten)
    assert "unload" not in str(caught.value)
    assert len(str(caught.value)) < 300
    exec(line_in(caught.value), {"model": model, "nn": nn})
    load_adapter(model, ten)
    assert torch.allclose(outputs(model), of_ten, atol=1e-5)
    model.head = nn.Linear(8, 3)
    load_adapter(model, three)  # and back
    assert torch.allclose(outputs(model), of_three, atol=1e-5)
    assert take_adapter(model).whole_tensors().keys() == {"head.weight", "head.bias"}
    assert torch.equal(merged_state_dict(model)["head.weight"], three.tensors["head.weight"])


def test_a_head_in_a_sequence_is_named_by_a_line_that_runs():
    def sequence(classes: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, classes, bias=False))

    inject(other := sequence(10), LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    with pytest.raises(LoRAError, match="another size") as caught:
        load_adapter(model := sequence(3), take_adapter(other))
    exec(line_in(caught.value), {"model": model, "nn": nn})
    assert load_adapter(model, take_adapter(other)) == ["0"]


def test_a_head_that_took_the_place_of_another_goes_back_to_its_own_first_values_with_unload():
    (three, _), (ten, _) = trained(3), trained(10)
    load_adapter(model := network(3), three)
    model.head = head = nn.Linear(8, 10)
    first = head.weight.detach().clone()
    load_adapter(model, ten)
    unload(model)
    assert torch.equal(model.head.weight, first)


def test_a_strength_beside_a_trained_head_is_refused_with_a_call_that_halves_the_adapter_and_keeps_the_head():
    adapter, _ = trained(3)
    load_adapter(model := network(3), adapter)
    with pytest.raises(LoRAError, match=r"load_adapter\(model, combine\(\[adapter\], \[0\.5\]\)\)"), scaled(model, 0.5):
        pass
    load_adapter(model, combine([adapter], [0.5]))
    now = merged_state_dict(model)
    change = adapter.scaling("body") * adapter.tensors["body.lora_B"] @ adapter.tensors["body.lora_A"]
    assert torch.allclose(now["body.weight"], network(3).body.weight + 0.5 * change, atol=1e-6)
    assert torch.equal(now["head.weight"], adapter.tensors["head.weight"])
    assert torch.equal(now["head.bias"], adapter.tensors["head.bias"])


@pytest.mark.parametrize("injected", [False, True])
def test_a_base_of_another_width_is_called_another_base(injected: bool):
    adapter, _ = trained(3)
    model = network(3, width=12)
    if injected:
        inject(model, LoRAConfig(r=3, lora_alpha=5, target_modules=["body"]))
    with pytest.raises(LoRAError, match=r"belongs to another base, of another width: 'body\.lora_B'") as caught:
        load_adapter(model, adapter)
    assert "unload" not in str(caught.value)


def test_a_difference_of_options_is_no_list_of_every_layer():
    deep = nn.ModuleList(nn.Linear(4, 4) for _ in range(24))
    ranks = {f"^{number}$": 1 + number % 2 for number in range(24)}
    said = LoRAConfig(rank_pattern=ranks).differences(LoRAConfig())
    assert len(said) == 1
    assert len(said[0]) < 200
    inject(deep, LoRAConfig(rank_pattern=ranks))
    assert read_adapter(take_adapter(deep)).config.rank_pattern == ranks
