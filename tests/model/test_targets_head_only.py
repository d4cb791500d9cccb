"""target_modules=[]: no layer is adapted, the base is frozen, and a head, rows or biases are trained whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_stats,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    merged_tensors,
    save_merged,
    scaled,
    summary,
    unload,
    unmerge,
)
from support.models.networks import Zoo

HEAD = LoRAConfig(target_modules=[], modules_to_save=["head"])
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [5, 0, 7, 8, 9]])


def trained_zoo() -> tuple[Zoo, Zoo]:
    """A model whose head was trained, and the model before."""
    before = Zoo().eval()
    model = copy.deepcopy(before)
    assert inject(model, HEAD) == []
    model(TOKENS).square().sum().backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    return model, before


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_the_head_is_trained_and_nothing_else():
    model, before = trained_zoo()
    assert trainable(model) == ["head.weight", "head.bias"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    assert changed == ["head.weight", "head.bias"]
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"trainable_token_indices": {"embed": [2, 3]}}, ["embed.lora_rows"]),
        ({"bias": "all"}, ["conv.bias", "norm.bias", "body.0.bias", "body.1.bias", "body.3.bias", "head.bias"]),
    ],
    ids=["rows", "biases"],
)
def test_what_else_may_be_trained_without_layers(options: dict[str, Any], names: list[str]):
    inject(model := Zoo(), LoRAConfig(target_modules=[], **options))
    assert trainable(model) == names


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["body.2"]}, {"bias": "lora_only"}],
    ids=["nothing else", "a module without parameters", "biases of no layer"],
)
def test_nothing_to_train_is_refused_and_the_model_is_as_it_was(options: dict[str, Any]):
    model = Zoo()
    with pytest.raises(LoRAError, match=r"target_modules: \[\] adapts no layer, and nothing else is trained; name"):
        inject(model, LoRAConfig(target_modules=[], **options))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not [name for name in vars(model) if "lora" in name]


def test_merging_is_nothing_and_what_looks_at_adapters_finds_none(tmp_path):
    model, _ = trained_zoo()
    weights, expected = copy.deepcopy(model.state_dict()), model(TOKENS)
    merge(model)
    assert not is_merged(model)
    unmerge(model)
    with merged(model):
        assert not is_merged(model)
        assert torch.equal(model(TOKENS), expected)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    plain = Zoo().eval()
    plain.load_state_dict(merged_state_dict(model))
    assert torch.equal(plain(TOKENS), expected)
    save_merged(model, tmp_path)
    assert adapter_stats(model, previous=adapter_stats(model)).groups == {}
    assert str(summary(model)).startswith("No adapter (target_modules=[])")
    assert torch.equal(merge_and_unload(model)(TOKENS), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_is_there_while_the_head_is_off_and_after_unload(tmp_path):
    model, before = trained_zoo()
    assert not torch.equal(model(TOKENS), before(TOKENS))
    with disable_adapter(model):
        assert torch.equal(model(TOKENS), before(TOKENS))
        with pytest.raises(LoRAError, match="refused inside `with disable_adapter"):
            save_merged(model, tmp_path)
    with scaled(model, 0.0):
        assert torch.equal(model(TOKENS), before(TOKENS))
        assert all(torch.equal(value, before.state_dict()[name]) for name, value in merged_tensors(model))
    assert not torch.equal(model(TOKENS), before(TOKENS))
    with pytest.raises(LoRAError, match="is fully trained, which has no strength"), scaled(model, 0.5):
        pass
    unload(model)
    assert torch.equal(model(TOKENS), before(TOKENS))
