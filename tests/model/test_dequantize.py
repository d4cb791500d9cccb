"""Quantized transformers models: adapters to and from PEFT, and merged folders that load without quantization."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    load_adapter,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    save_merged,
)
from lightning_lora.errors import NonFiniteError
from lightning_lora.nn.lora_layer import LoRALayer
from support.models.networks import randomise_, same
from support.models.quantized import adapted, inputs, packed_bits, reference, run_reference, values_of
from support.runs.notices import quiet_peers

pytestmark = [*quiet_peers, pytest.mark.transformers_5]

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TOKENS = torch.arange(12).view(2, 6)
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def config_of(kind: str) -> Any:
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )


def load(path: Path, kind: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model in training mode, in which bitsandbytes computes as precisely as it can; this one has no dropout."""
    options = {} if kind is None else {"quantization_config": config_of(kind), "device_map": "cpu"}
    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype, **options).train()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_reads_our_folder_on_the_same_base_with_equal_outputs(tmp_path, folder, kind):
    model = load(folder, kind)
    inject(model, LoRAConfig(r=4, lora_alpha=16))
    randomise_(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path / "ours").train()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    with disable_adapter(model):
        assert float((logits(model) - logits(theirs)).norm()) > 1e-2


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_we_read_the_folder_of_peft_on_the_same_base_with_equal_outputs_and_gradients(tmp_path, folder, kind):
    options = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(load(folder, kind), options)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(folder, kind)
    assert len(load_adapter(model, tmp_path / "theirs")) == 4
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    for each in (model, theirs):
        each(TOKENS).logits.square().sum().backward()
    found = model.get_submodule(LAYER)
    expected = theirs.base_model.model.get_submodule(LAYER)
    torch.testing.assert_close(found.lora_A.grad, expected.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lora_B.grad, expected.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "stored"), [("nf4", "in files"), ("int8", "on the way"), ("torchao", "on the way")])
def test_save_merged_writes_a_plain_folder_for_from_pretrained(tmp_path, folder, kind, stored, caplog):
    model = load(folder, kind, torch.bfloat16)
    if stored == "in files":
        model.save_pretrained(tmp_path / "quantized")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu").train()
    inject(model, LoRAConfig(r=4, lora_alpha=16))
    randomise_(model)
    base = model.get_submodule(LAYER)
    expected = values_of(base) + 4 * base.lora_B.detach().double() @ base.lora_A.detach().double()
    live = packed_bits(model)
    with pytest.raises(LoRAError, match=r"is quantized \(.*dequantize=\"bfloat16\" \(save_merged"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with caplog.at_level(logging.INFO, "lightning_lora"):
        save_merged(model, tmp_path / "merged", dequantize="float32")
    assert "rounding costs" not in caplog.text  # 0.0%
    assert packed_bits(model) == live
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    plain, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {type(m) for name, m in plain.named_modules() if name.endswith("proj")} == {nn.Linear}
    assert same(plain.get_submodule(LAYER).weight, expected.float())
    difference = logits(plain.train()) - logits(model)
    assert float(difference.norm() / logits(model).norm()) < 2e-2


def test_a_quantized_weight_without_an_adapter_is_written_plain_too_or_refused(tmp_path, folder):
    model = load(folder, "nf4")
    inject(model, LoRAConfig(r=2, target_modules=["lm_head"]))  # which transformers does not quantize
    randomise_(model)
    state = merged_state_dict(model)
    assert state[f"{LAYER}.weight"].dtype == torch.uint8
    assert f"{LAYER}.weight.absmax" in state
    with pytest.raises(LoRAError, match=r"'model\.layers\.0\.self_attn\.q_proj\.weight' is quantized"):
        save_merged(model, tmp_path / "merged")
    save_merged(model, tmp_path / "merged", dequantize=torch.float32)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain.train()), logits(model), rtol=1e-4, atol=1e-4)
    save_merged(model, tmp_path / "narrow", dequantize="bfloat16")  # what is not quantized stays float32
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "narrow")
    assert torch.equal(plain.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(plain.get_submodule(LAYER).weight, values_of(model.get_submodule(LAYER)).bfloat16().float())


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_merge_and_unload_leaves_a_model_whose_own_save_is_plain(tmp_path, folder, kind):
    model = load(folder, kind)
    inject(model, LoRAConfig(r=4, lora_alpha=16))
    randomise_(model)
    expected = logits(model)
    with pytest.raises(LoRAError, match="is quantized"):
        merge_and_unload(copy.deepcopy(model))
    assert merge_and_unload(model, dequantize="float32") is model
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert {type(layer) for name, layer in model.named_modules() if name.endswith("proj")} == {nn.Linear}
    model.to(torch.float64).to(torch.float32)  # which transformers refuses for bitsandbytes' layers
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded.train()), logits(model), rtol=1e-6, atol=1e-6)


def test_a_quantized_model_whose_merged_weight_is_not_finite_stays_as_it_is():
    model = adapted("nf4")
    with torch.no_grad():
        model[2].lora_B.fill_(float("inf"))
    before = packed_bits(model)
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        merge_and_unload(model, dequantize="float32")
    assert packed_bits(model) == before
    assert isinstance(model[2], LoRALayer)


def test_merged_weights_are_the_nearest_in_each_dtype(tmp_path):
    model = adapted("fp4")
    exact = reference(model)
    for name, dtype in {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}.items():
        save_merged(model, tmp_path / name, dequantize=name)
        state = merged_state_dict(model, dequantize=dtype)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert {key: file.get_tensor(key).dtype for key in file.keys() if key.endswith("weight")} == dict.fromkeys(  # noqa: SIM118
                ("0.weight", "2.weight", "4.weight"), dtype
            )
            for position in (0, 2, 4):
                layer = exact[position]
                expected = (layer.weight + 2 * layer.B @ layer.A).detach()
                found = file.get_tensor(f"{position}.weight")
                assert same(found, state[f"{position}.weight"])
                torch.testing.assert_close(found, expected.to(dtype), rtol=1e-12, atol=1e-15)
    assert torch.isfinite(run_reference(exact, inputs().double())).all()


def test_the_rounding_of_a_small_adapter_is_warned_of(tmp_path):
    model = adapted("nf4")
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.lora_B.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"merged: 16-bit weights: rounding costs \d+\.\d% .*float32"):
        save_merged(model, tmp_path / "merged", dequantize="bfloat16")
