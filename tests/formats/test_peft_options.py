"""An edited adapter_config.json beside our description: an option that PEFT honours counts, or is refused by name."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lightning_lora.exchange.save_load import read_adapter
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.models.networks import Zoo
from support.models.peers import Fused, close, edit, fill_, logits, model, ours, read_by_peft, seeded
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
EDITED: list[dict[str, Any]] = [
    {"lora_alpha": 5},
    {"lora_alpha": 0.5, "use_rslora": True},
    {"use_rslora": False},
    {"alpha_pattern": {"LAYER": 3}},
    {"alpha_pattern": {}},
]
LAYER = {"gpt2": "c_attn", "convolutions": "mha"}  # one of a model's


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"init_lora_weights": "olora", "use_rslora": True},
    "llama-dora": {},
    "gpt2": {},
    "convolutions": {},
}


@pytest.mark.parametrize(("fields", "name"), covering(EDITED, VARIANTS, meet=1))
def test_edited_scalings_are_those_that_peft_applies(tmp_path, fields: dict[str, Any], name: str):
    untouched = logits(ours(name, tmp_path, **VARIANTS[name]))
    patterns = {LAYER.get(name, "q_proj"): alpha for alpha in fields.get("alpha_pattern", {}).values()}
    edit(tmp_path, **(fields if "alpha_pattern" not in fields else {"alpha_pattern": patterns}))
    expected, close = logits(read_by_peft(name, tmp_path)), {"rtol": 1e-4, "atol": 1e-5}
    load_adapter(plain := model(name), tmp_path)
    torch.testing.assert_close(logits(plain), expected, **close)
    assert "lora_alpha" not in fields or (untouched - expected).abs().max() > 1e-3
    load_adapter(swapped := ours(name, **VARIANTS[name]), tmp_path)
    torch.testing.assert_close(logits(swapped), expected, **close)
    save_adapter(plain, tmp_path / "again")
    torch.testing.assert_close(logits(read_by_peft(name, tmp_path / "again")), expected, **close)


def test_an_edited_alpha_holds_for_parts_of_a_fused_projection(tmp_path):
    net = seeded(Fused)
    inject(net, LoRAConfig(r=2, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}))
    fill_(net)
    save_adapter(net, tmp_path)
    edit(tmp_path, lora_alpha=48)
    loaded = seeded(Fused)
    load_adapter(loaded, tmp_path)
    x = torch.randn(3, 6)
    close(loaded(x), peft.PeftModel.from_pretrained(seeded(Fused), tmp_path).eval()(x))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"r": 8}, r"adapter_config.json: '.*': the options say r=8, but its factors have rank 4"),
    ("llama", {"rank_pattern": {}}, r"adapter_config.json: '.*': the options say r=4, but its factors have rank 2"),
    ("llama", {"use_dora": True}, r"lora_magnitude' is missing"),
    ("llama-dora", {"use_dora": False}, r"or use_dora=true is missing in the options"),
    ("llama", {"peft_type": "LOHA"}, r"'.*lora_[AB]' is of no adapted layer"),
    ("llama", {"trainable_token_indices": [1, 2]}, "trainable_token_indices names '', whose rows are missing"),
]


@pytest.mark.parametrize(("name", "fields", "said"), REFUSED, ids=str)
def test_a_field_that_does_not_go_with_the_tensors_is_refused(tmp_path, name, fields, said):
    ours(name, tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(LoRAError, match=said):
        load_adapter(model(name), tmp_path)


WORDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"bias": "all", "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": None, "modules_to_save": ["lm_head"]}),
    ("llama", {"layers_to_transform": [1], "target_parameters": ["norm.weight"]}),
    ("llama-embedding", {"bias": "none"}),
    ("convolutions", {"modules_to_save": None}),
]


@pytest.mark.parametrize(("name", "fields"), WORDS, ids=str)
def test_fields_that_select_layers_and_modules_are_words(tmp_path, name, fields):
    """PEFT would leave out tensors, or make others; here the tensors say what is adapted and trained."""
    net = ours(name, tmp_path)
    edit(tmp_path, **fields)
    loaded = model(name)
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(net))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in net.named_parameters() if p.requires_grad
    }


PLACES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
EVERY_LAYER = [f"layers.{i}.{place}" for i in (0, 1) for place in PLACES]
SAME: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 2, "rank_pattern": {"v_proj": 4, "down_proj": 4}, "lora_alpha": 8}),
    ("llama", {"target_modules": EVERY_LAYER, "layers_to_transform": [1, 0], "modules_to_save": []}),
    ("llama", {"target_modules": ["q_proj", "down_proj", "v_proj", "nothing"], "exclude_modules": ["lm_head"]}),
    ("llama", {"lora_dropout": 0.5, "fan_in_fan_out": True, "inference_mode": False, "init_lora_weights": False}),
    ("gpt2", {"fan_in_fan_out": False}),
    ("convolutions", {"modules_to_save": ["head", "classifier"], "trainable_token_indices": {}}),
]


@pytest.mark.parametrize(("name", "fields"), SAME, ids=str)
def test_fields_that_mean_the_same_for_the_tensors_are_taken(tmp_path, name, fields):
    net = ours(name, tmp_path)
    edit(tmp_path, **fields)
    loaded = model(name)
    load_adapter(loaded, tmp_path)
    close(logits(loaded), logits(net))
    assert open_model(loaded, "test").injection.config.lora_dropout == fields.get("lora_dropout", 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "You have passed exclude_modules")
        close(logits(peft.PeftModel.from_pretrained(model(name), tmp_path).eval()), logits(net))


def test_edited_rows_are_those_that_peft_applies_and_parameters_are_words(tmp_path):
    net = seeded(Zoo)
    options = {"target_modules": [], "target_parameters": ["head.weight"], "trainable_token_indices": {"embed": [1, 2]}}
    inject(fill_(net), LoRAConfig(r=2, **options))
    fill_(net)
    save_adapter(net, tmp_path)
    rows = net.embed.lora_rows.detach()
    for field, value, numbers, expected in (
        ("trainable_token_indices", {"embed": [1, 3]}, (1, 3), rows),
        ("trainable_token_indices", {"embed": [2, 1]}, (1, 2), rows.flip(0)),
        ("target_parameters", ["body.0.weight"], (1, 2), rows),
    ):
        edit(tmp_path, **{field: value})
        adapter = read_adapter(tmp_path)
        assert adapter.tables["embed"] == numbers
        assert torch.equal(adapter.rows()["embed"], expected)
        assert adapter.parameters == ["head.weight"]
        edit(tmp_path, **{field: options[field]})


def test_the_tensor_file_by_itself_goes_by_its_description(tmp_path: Path):
    net = ours("llama", tmp_path)
    edit(tmp_path, lora_alpha=80)
    alone = model("llama")
    load_adapter(alone, tmp_path / "adapter_model.safetensors")
    close(logits(alone), logits(net))


@pytest.mark.parametrize(
    ("pattern", "option"), [(r"(.*\.)+q_proj", "rank_pattern"), (r"(q|v){1,9}_proj", "alpha_pattern")]
)
def test_a_pattern_that_repeats_a_group_is_refused(tmp_path, pattern: str, option: str):
    """It is compared with each layer's name, and may take for ever. Other patterns of a file are compared with none."""
    ours("llama", tmp_path)
    edit(tmp_path, **{option: {pattern: 2}})
    with pytest.raises(LoRAError, match="repeats a group"):
        load_adapter(model("llama"), tmp_path)
    edit(tmp_path, **{option: {}}, target_modules=r"(.*\.)+(q_proj)+")
    if option == "alpha_pattern":
        load_adapter(model("llama"), tmp_path)


def test_patterns_of_one_layer_each_and_others_mean_what_they_do_in_peft(tmp_path):
    """Where all of them name one layer each, they are looked up."""
    ours("llama", tmp_path)
    layers = list(read_adapter(tmp_path).layers)
    exact = {f"^{re.escape(name)}": 3 + place for place, name in enumerate(layers)}
    for patterns in (exact, {"v_proj": 9, **exact}, {**exact, "v_proj": 9}):
        edit(tmp_path, alpha_pattern=patterns)
        config = peft.LoraConfig.from_pretrained(tmp_path)
        for name, layer in read_adapter(tmp_path).layers.items():
            key = peft.utils.other.get_pattern_key(patterns, name)
            assert layer.scaling == pytest.approx(patterns.get(key, config.lora_alpha) / layer.r), name
