"""What rounding of merged weights to 16 bits costs: reported once, with a warning where it matters."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
    is_merged,
    merge,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    unmerge,
)
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.nn.rounding import IN_FILES
from support.models.networks import randomise_, state_bits
from support.models.quantized import adapted


def with_adapter_of(share: float, dtype: torch.dtype) -> nn.Sequential:
    """Two layers whose delta has that share of the weight's norm."""
    model = nn.Sequential(nn.Linear(256, 256, dtype=dtype), nn.Linear(256, 256, dtype=dtype))
    inject(model, LoRAConfig(r=4))
    randomise_(model)
    for layer in model:
        with torch.no_grad():
            delta = layer.lora_B @ layer.lora_A * layer.lora.spec.scaling
            layer.lora_B.mul_(share * layer.weight.float().norm() / delta.norm())
    return model


def cost(model: nn.Sequential) -> float:
    """The rounding error of W' over the adapter's norm, by hand in float64."""
    errors, deltas = [], []
    for layer in model:
        delta = layer.lora_B.double() @ layer.lora_A.double() * layer.lora.spec.scaling
        exact = layer.weight.double() + delta
        errors.append((exact.to(layer.weight.dtype).double() - exact).flatten())
        deltas.append(delta.flatten())
    return float((torch.cat(errors).norm() / torch.cat(deltas).norm()).detach())


@pytest.mark.parametrize(
    ("share", "dtype", "warns"),
    [
        (0.01, torch.bfloat16, True),
        (0.2, torch.bfloat16, False),
        (0.01, torch.float16, False),
        (1e-3, torch.float16, True),
    ],
)
def test_the_first_merge_into_16_bits_reports_its_cost_once(caplog, share, dtype, warns):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    model = with_adapter_of(share, dtype)
    expected = cost(model)
    assert (expected > 0.05) == warns  # the case is what it claims to be
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            merge(model)
            unmerge(model)
    report = f"lightning_lora: merged 16-bit weights: rounding costs {expected:.1%} of the adapter's norm"
    assert [record.getMessage() for record in caplog.records] == [report] * (not warns)
    assert [str(warning.message).startswith(f"{report}. ") for warning in caught] == [True] * warns
    assert all("merged_eval=False" in str(w.message) and w.filename == __file__ for w in caught)


def test_merge_in_full_precision_or_without_effect_gives_no_rounding_report(caplog):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    with merged(with_adapter_of(0.01, torch.float32)):
        pass
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    inject(model, LoRAConfig(r=2))
    with merged(model):
        pass
    assert not caplog.records
    randomise_(model, 1.0)
    with merged(model):
        pass
    assert len(caplog.records) == 1  # the first one that means something


def test_rounding_warning_raised_as_an_error_leaves_a_consistent_model():
    model = with_adapter_of(0.01, torch.bfloat16)
    before = state_bits(model)
    with pytest.raises(UserWarning, match="rounding costs"):  # as pytest here is set up
        merge(model)
    flags = {layer.lora.merged for layer in model}
    assert len(flags) == 1
    assert state_bits(model) == before
    with merged(model):
        assert is_merged(model)
    unmerge(model)
    assert state_bits(model) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantized_weights_are_warned_of_once_in_16_bits_alone(caplog, dtype):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    model = adapted("nf4")
    with torch.no_grad():
        for position in (0, 2, 4):
            model[position].lora_B.mul_(1e-7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            merged_state_dict(model, dequantize=dtype)
    logged = [record.getMessage() for record in caplog.records if "rounding" in record.getMessage()]
    warned = [str(warning.message) for warning in caught if "rounding" in str(warning.message)]
    assert (len(logged), len(warned)) == (0, dtype == "bfloat16")
    assert not warned or float(warned[0].partition("costs ")[2].partition("%")[0]) > 5


@pytest.mark.parametrize(("write", "share"), [("save_merged", 0.01), ("the command", 0.2)])
def test_a_file_of_merged_16_bit_weights_tells_what_it_lost(tmp_path, caplog, write, share):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    model = with_adapter_of(share, torch.bfloat16)
    save_adapter(model, tmp_path / "adapter")
    base = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    save_file(base, tmp_path / "base.safetensors")
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if write == "save_merged":
            save_merged(model, output := tmp_path / "merged")
        else:
            output = tmp_path / "merged.safetensors"
            merge_on_disk(tmp_path / "base.safetensors", tmp_path / "adapter", output)
    report = f"lightning_lora: {output}: 16-bit weights: rounding costs {cost(model):.1%} of the adapter's norm"
    said = [record.getMessage() for record in caplog.records] or [str(warning.message) for warning in caught]
    assert [text.removesuffix(f". {IN_FILES}") for text in said] == [report]
    assert bool(caught) == (share == 0.01)
