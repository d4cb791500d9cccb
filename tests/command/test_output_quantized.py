"""Quantized bases as files: the command refuses them and says what works instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, LoRAError, inject, save_adapter
from lightning_lora.command.extract import extract
from lightning_lora.command.info import diff, info
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.files.weights import open_weights
from support.files.expected_weights import merge_and_check
from support.models.networks import randomise_, same
from support.models.peers import call
from support.models.quantized import network, quantized

REMEDY = r"the weight of '0' is quantized, as '0\.(SCB|weight\.absmax)' shows.*save_merged\(model, path, dequantize="


def adapter(path: Path, model: Any, **options: Any) -> Path:
    inject(model, LoRAConfig(**{"r": 2} | options))
    randomise_(model)
    save_adapter(model, path)
    return path


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_weight_is_neither_merged_nor_compared_and_the_remedy_is_told(tmp_path, kind: str):
    state = {name: value.clone() for name, value in quantized(kind).state_dict().items()}
    save_file(state, base := tmp_path / "base.safetensors")
    save_file(network().state_dict(), plain := tmp_path / "plain.safetensors")
    path = adapter(tmp_path / "adapter", network())
    with pytest.raises(LoRAError, match=f"merge: .*{REMEDY}"):
        merge_on_disk(base, path, tmp_path / "out.safetensors", strict_base=False)
    trained_on_it = adapter(tmp_path / "trained on it", quantized(kind))
    with pytest.raises(LoRAError, match="the base that it was quantized from, with --strict-base=false where"):
        merge_on_disk(base, trained_on_it, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    for first, second in ((base, plain), (plain, base)):
        with pytest.raises(LoRAError, match=f"diff: .*{REMEDY}"):
            diff(first, second)
        with pytest.raises(LoRAError, match=f"extract: .*{REMEDY}"):
            extract(open_weights(first), open_weights(second), 2)


def test_plain_weights_beside_quantized_ones_are_merged(tmp_path):
    """As an output head, which is not quantized; the rest is copied byte for byte."""
    model = quantized("nf4 nested")
    model[4] = network()[4]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(before, tmp_path / "base.safetensors")
    path = adapter(tmp_path / "adapter", model, target_modules=["4"])
    merge_and_check(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert {name for name in merged if not same(merged[name], before[name])} == {"4.weight"}


def test_an_adapter_of_a_quantized_base_is_merged_into_the_plain_one_on_request(tmp_path):
    save_file(network().state_dict(), tmp_path / "base.safetensors")
    path = adapter(tmp_path / "adapter", quantized("nf4"))
    with pytest.raises(
        LoRAError, match=r"the base was quantized \(nf4\), here it is not quantized.*--strict-base=false"
    ) as refused:
        merge_on_disk(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors")
    assert 'save_merged(model, path, dequantize="bfloat16")' in str(refused.value)
    assert "--base," not in str(refused.value)  # the command refuses the quantized base
    with pytest.warns(UserWarning, match="here it is not quantized") as warned:
        merge_on_disk(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors", strict_base=False)
    assert "Quantize the base" not in str(warned[0].message)  # it was chosen not to
    assert load_file(tmp_path / "out.safetensors")["0.weight"].dtype == torch.float32


def test_a_whole_tensor_that_the_base_lacks_is_refused_before_another_quantization_is_told(tmp_path):
    """Else the advice to pass --strict-base=false would be given twice."""
    state = {name: value for name, value in network().state_dict().items() if not name.startswith("4.")}
    save_file(state, tmp_path / "base.safetensors")
    model = quantized("nf4")
    model[4] = network()[4]
    path = adapter(tmp_path / "adapter", model, modules_to_save=["4"])
    message = r"the adapter comes with '4\.\w+' whole, and the base has no such tensor"
    with pytest.raises(LoRAError, match=message):
        merge_on_disk(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors")
    with pytest.warns(UserWarning, match=message), pytest.warns(UserWarning, match="quantized"):
        merge_on_disk(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors", strict_base=False)
    assert load_file(tmp_path / "out.safetensors").keys() == state.keys()


def test_info_tells_how_the_base_was_quantized(tmp_path, capsys):
    path = adapter(tmp_path / "adapter", quantized("nf4"))
    counts = info(path)["base"]["dtypes"]
    assert counts["nf4"] == sum(isinstance(layer, torch.nn.Linear) for layer in network())
    assert f"{counts['nf4']} nf4" in call(capsys, "info", path)
