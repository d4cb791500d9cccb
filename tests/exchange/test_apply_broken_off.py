"""load_adapter that fails at any step, before it or after it: the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import inject, is_merged, load_adapter, merge
from lightning_lora.exchange import apply
from lightning_lora.model.adapted_model import AdaptedModel
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.nn.adapted_weights import AdaptedWeights
from support.models.networks import base_zoo, checkpoint, randomise_, state_bits, trace, trained_zoo, zoo_config

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
LOADS: dict[str, tuple[bool, dict[str, Any], set[str]]] = {  # whether injected, the adapter, the steps of it
    "onto a plain model": (False, {}, {"inject_layers", "check_adapter", "record_trained", "_write_"}),
    "of another rank": (True, {"r": 5, "lora_alpha": 3}, {*STEPS} - {"inject_layers", "replace_layers"}),
    "of other layers": (True, {"target_modules": ["conv"]}, {*STEPS} - {"inject_layers", "take_spec_"}),
}


def built(injected: bool) -> nn.Module:
    if not injected:
        return base_zoo()
    model = trained_zoo()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    merge(model)
    return model


def found(model: nn.Module, load: str) -> Any:
    layers = adapted_layers(model)
    seen = state_bits(model), is_merged(model), {name: layer.lora.spec for name, layer in layers.items()}
    if load == "of other layers":  # a replaced parameter has other memory, and no gradient
        return seen
    injection = getattr(model, "lora_injection", None)
    options = None if injection is None else (injection.config, injection.chosen)
    return seen, options, trace(model), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:lightning_lora. load_adapter. .* layers that have gradients")
@pytest.mark.parametrize("load", LOADS)
def test_a_load_that_fails_at_any_call_of_any_step_leaves_the_model_as_it_was(
    load: str, monkeypatch: pytest.MonkeyPatch
):
    injected, options, expected = LOADS[load]
    inject(other := base_zoo(), zoo_config(**options))
    randomise_(other)
    adapter, failed = checkpoint(other, "adapter"), set()
    for step, owner in STEPS.items():
        honest, calls = getattr(owner, step), 0
        for fails_at in [(call, when) for call in range(1, 4) for when in ("before", "after")]:
            calls, model = 0, built(injected)
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
                    assert found(model, load) == before, (step, fails_at)
                else:
                    break
    assert failed >= expected
