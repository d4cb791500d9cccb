"""merged_tensors of quantised bases: as merged_state_dict, dequantised, or beside a plain adapted layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, LoRAError, inject, merged_state_dict, merged_tensors
from support.models import bits
from support.quantised import QUANTISED, adapted, packed_bits, quantised


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_dequantised_as_in_merged_state_dict(kind: str):
    model = adapted(kind)
    before = packed_bits(model)
    with pytest.raises(LoRAError, match="is quantised"):
        merged_tensors(model)
    expected = merged_state_dict(model, dequantize="float32")
    found = dict(merged_tensors(model, dequantize="float32"))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert bits(found[name]) == bits(value), name
    assert packed_bits(model) == before


def beside_plain(kind: str) -> Any:
    """The first layer is plain and adapted. The others are quantised and not adapted."""
    model, plain = quantised(kind), torch.nn.Linear(128, 64)
    model[0] = plain
    inject(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    return model


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_that_are_not_adapted_stay_as_they_are(kind: str):
    model = beside_plain(kind)
    expected = {name: value for name, value in merged_state_dict(model).items() if isinstance(value, torch.Tensor)}
    found = dict(merged_tensors(model))
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert bits(as_strided(found[name])) == bits(as_strided(value)), name


def as_strided(tensor: Any) -> torch.Tensor:
    """Return the values of a tensor; of torchao's classes the dequantised ones."""
    if not type(tensor).__module__.startswith("torchao"):
        return tensor
    values: torch.Tensor = (
        tensor.get_original_weight() if hasattr(tensor, "get_original_weight") else tensor.dequantize()
    )
    return values
