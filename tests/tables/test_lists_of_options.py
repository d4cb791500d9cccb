"""Wherever options of one sort are treated alike, the list of them is made of LoRAConfig's fields.

An option that decides ranks or scalings and is added without a value below is a failing test.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    combine,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lightning_lora.config import options_that_decide
from lightning_lora.formats.plain import served_form
from lightning_lora.model.adapted_model import open_model
from lightning_lora.trainer.compatibility import refuse_other_options

OTHERS: dict[str, Any] = {  # another value than the default, for one or both of the layers
    "r": 4,
    "lora_alpha": 5,
    "rank_pattern": {"2": 3},
    "alpha_pattern": {"2": 3},
    "use_rslora": True,
}
EVERY = pytest.mark.parametrize("option", options_that_decide("ranks", "scaling"))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))


def facts(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {
        name: (layer.lora.spec.r, layer.lora.spec.scaling) for name, layer in open_model(model, "test").layers.items()
    }


def stated(config: LoRAConfig, names: Any) -> dict[str, tuple[int, float]]:
    return {name: (config.rank(name), config.scaling(name)) for name in names}


@EVERY
def test_an_option_of_ranks_and_scalings_changes_a_layer_and_a_callback_with_the_default_is_refused(option: str):
    plain, config = (
        LoRAConfig(target_modules=["0", "2"]),
        LoRAConfig(target_modules=["0", "2"], **{option: OTHERS[option]}),
    )
    inject(model := net(), config)
    assert facts(model) == stated(config, ["0", "2"]) != stated(plain, ["0", "2"])
    with pytest.raises(LoRAError, match=f"LoRACallback: {option} is"):
        refuse_other_options(
            open_model(model, "test"), LoRACallback(**{option: getattr(plain, option)}).config, [option]
        )


@EVERY
def test_a_loaded_adapter_is_compared_by_its_layers_whatever_options_say_so(option: str, tmp_path: Any):
    config = LoRAConfig(target_modules=["0", "2"], **{option: OTHERS[option]})
    inject(model := net(), config)
    save_adapter(model, tmp_path)
    load_adapter(loaded := net(), tmp_path)
    handle, given = open_model(loaded, "test"), options_that_decide("ranks", "scaling")
    by_name = stated(config, ["0", "2"])
    same = LoRAConfig(
        target_modules=["0", "2"],
        rank_pattern={name: r for name, (r, _) in by_name.items()},
        alpha_pattern={name: r * scaling for name, (r, scaling) in by_name.items()},
    )
    refuse_other_options(handle, same, given)
    with pytest.raises(LoRAError, match=f"LoRACallback: {option} is"):
        refuse_other_options(handle, replace(config, **{option: getattr(LoRAConfig, option)}), [option])


@EVERY
def test_options_of_a_served_or_combined_adapter_say_what_its_layers_have(option: str, tmp_path: Any):
    inject(model := net(), LoRAConfig(target_modules=["0", "2"], **{option: OTHERS[option]}))
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    for made in (served_form(adapter, None), combine([adapter]), combine([adapter], rank=2)):
        has = {name: (layer.r, layer.scaling) for name, layer in made.layers.items()}
        assert stated(made.config, has) == has
