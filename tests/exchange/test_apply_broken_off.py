"""load_adapter that fails at any step, before it or after it: the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, is_merged, load_adapter, merge, summary, take_adapter
from lightning_lora.exchange import apply
from lightning_lora.model.adapted_model import AdaptedModel, find_adapted
from lightning_lora.model.facts import Fact
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.nn.adapted_weights import AdaptedWeights
from support.models.networks import base_zoo, bits, checkpoint, randomise_, state_bits, trace, trained_zoo, zoo_config

STEPS = {  # in the order in which a load calls them
    "inject_layers": apply,
    "unmerge_listed": apply,
    "replace_layers": apply,
    "check_adapter": apply,
    "record_trained": apply,
    "take_spec_": AdaptedWeights,
    "_write_": apply,
    "record_trainable": AdaptedModel,
    "merge_listed": apply,
}
OTHER_LAYERS = {"target_modules": ["conv"], "modules_to_save": ["head", "norm"]}
LOADS: dict[str, tuple[dict[str, Any], set[str]]] = {  # the adapter, the steps of it
    "onto a plain model": ({}, {"inject_layers", "check_adapter", "record_trained", "_write_"}),
    "of another rank": ({"r": 5, "lora_alpha": 3}, {*STEPS} - {"inject_layers", "replace_layers"}),
    "of other layers": (OTHER_LAYERS, {*STEPS} - {"inject_layers", "take_spec_"}),
}


def built(load: str) -> nn.Module:
    if load == "onto a plain model":
        return base_zoo()
    model = trained_zoo()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    if load == "of other layers":
        model.norm.requires_grad_(True)
    merge(model)
    return model


def found(model: nn.Module, load: str) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    seen = {
        "values": state_bits(model),
        "merged": is_merged(model),
        "specs": {name: layer.lora.spec for name, layer in adapted_layers(model).items()},
        "parameters": {name: (id(p), p.requires_grad, p.data_ptr()) for name, p in parameters.items()},
        "gradients": {name: parameter.grad for name, parameter in parameters.items()},
    }
    handle = find_adapted(model)
    if handle is not None:
        injection = handle.injection
        seen["options"] = injection.config, injection.chosen, injection.origin, injection.trained_count
        seen["facts"] = {name: known(handle, tensor) for name, tensor, _ in handle.state()}
        seen["summary"] = str(summary(model))
    if load != "of other layers":  # where the layers are other objects with the same parameters
        seen["trace"] = trace(model)
    return seen


def known(handle: AdaptedModel, tensor: Any) -> Any:
    fact = handle.known[id(tensor)].fact if id(tensor) in handle.known else Fact()
    return fact.requires_grad, fact.trained, fact.initial is not None and bits(fact.initial), fact.entry


@pytest.mark.filterwarnings("ignore:lightning_lora. load_adapter. .* layers that have gradients")
@pytest.mark.parametrize("load", LOADS)
def test_a_load_that_fails_at_any_call_of_any_step_leaves_the_model_as_it_was(
    load: str, monkeypatch: pytest.MonkeyPatch
):
    options, expected = LOADS[load]
    inject(other := base_zoo(), zoo_config(**options))
    randomise_(other)
    adapter, failed = checkpoint(other, "adapter"), set()
    for step, owner in STEPS.items():
        honest, calls = getattr(owner, step), 0
        for fails_at in [(call, when) for call in range(1, 4) for when in ("before", "after")]:
            calls, model = 0, built(load)
            before = found(model, load)

            def failing(*args: Any, honest: Any = honest, fails_at: Any = fails_at, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if fails_at == (calls, "before"):
                    raise KeyboardInterrupt
                result = honest(*args, **options)
                if fails_at == (calls, "after"):
                    raise KeyboardInterrupt
                return result

            with monkeypatch.context() as patched:
                patched.setattr(owner, step, failing)
                try:
                    load_adapter(model, adapter)
                except KeyboardInterrupt:
                    failed.add(step)
                    after = found(model, load)
                    assert [key for key in before if after[key] != before[key]] == [], (step, fails_at)
                else:
                    break
    assert failed >= expected


@pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen")
@pytest.mark.parametrize("unfrozen", ["0.weight", "2.weight"])
def test_what_a_user_unfroze_still_trains_after_an_adapter_of_another_base_was_refused(unfrozen: str):
    other = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    inject(other, LoRAConfig(r=2, target_modules=["3"], modules_to_save=["2"]))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    inject(model, LoRAConfig(r=64, lora_alpha=8, target_modules=["0"]))
    model.get_parameter(unfrozen).requires_grad_(True)
    before = found(model, "of other layers")
    with pytest.raises(LoRAError, match="another base"):
        load_adapter(model, take_adapter(other))
    assert found(model, "of other layers") == before
    with pytest.warns(UserWarning, match=f"unfrozen after injection .{unfrozen}"):
        take_adapter(model)
