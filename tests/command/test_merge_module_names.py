"""Merging into bases whose files use other names than the model: renamed as transformers does, or by --rename."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, merged_state_dict, save_adapter, save_merged
from lightning_lora.command.merge import merge_on_disk
from support.expected_weights import check_merge_command, merge_and_check
from support.notices import TORCH_NOTICES, quiet_peers
from support.peers import call, fill_, refused, seeded
from support.pretrained import (
    Lit,
    assert_loads_as,
    base_and_adapter,
    bert,
    deit,
    detr,
    dinov2,
    gemma3,
    llava,
    qwen2_vl,
    vit,
)

pytestmark = [*quiet_peers, *TORCH_NOTICES, pytest.mark.transformers_5]  # older ones store modules' names

FAMILIES: dict[str, Callable[[], Any]] = {
    "vit": vit,
    "deit": deit,
    "detr": detr,
    "llava": llava,
    "qwen2-vl": qwen2_vl,
    "gemma3": gemma3,
}
SWIGLU = "dinov2.encoder.layer.0.mlp.gate_proj"  # half of a tensor of the file
VIT_NAMES = (
    r"encoder\.layer=layers",
    r"attention\.attention\.(q|k|v)[a-z]+=attention.\1_proj",
    r"attention\.output\.dense=attention.o_proj",
    r"(?<=\d)\.output\.dense=.mlp.fc2",  # an expression may hold "="
    r"intermediate\.dense=mlp.fc1",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_into_a_folder_with_other_names_than_the_modules_loads_as_the_merged_model(tmp_path, family: str):
    network = base_and_adapter(tmp_path, FAMILIES[family])
    assert not load_file(tmp_path / "base" / "model.safetensors").keys() >= {n for n, _ in network.named_parameters()}
    merge_and_check(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)


def test_merge_of_what_was_trained_whole_loads_as_the_merged_model(tmp_path):
    network = base_and_adapter(tmp_path, vit, target_modules=["q_proj"], modules_to_save=["classifier", "o_proj"])
    with torch.no_grad():
        network.vit.layers[0].attention.o_proj.weight.add_(1)
    save_adapter(network, tmp_path / "adapter")
    merge_and_check(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)


def test_merge_of_a_lightning_modules_checkpoint_takes_its_prefix_off_and_renames(tmp_path):
    network = base_and_adapter(tmp_path, vit)
    save_adapter(Lit(model=network), tmp_path / "module")
    merge_on_disk(tmp_path / "base", tmp_path / "module", tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)


def test_merge_of_pefts_adapter_into_a_folder_with_other_names_loads_as_pefts_merged_model(tmp_path):
    network = seeded(llava)
    network.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["q_proj", "linear_1"]))
    fill_(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    expected = theirs.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_merge_into_a_body_without_a_head_finds_the_bodys_modules(tmp_path):
    body = seeded(lambda: transformers.ViTModel(vit().config, add_pooling_layer=False))
    body.save_pretrained(tmp_path / "base")
    network = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    inject(network, LoRAConfig(r=2, target_modules=["q_proj", "fc1"]))
    fill_(network)
    save_adapter(network, tmp_path / "adapter")
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).state_dict()
    expected = merged_state_dict(network)
    assert all(torch.equal(value, expected[f"vit.{name}"]) for name, value in found.items())


def test_another_base_with_other_names_than_the_modules_is_refused(tmp_path):
    base_and_adapter(tmp_path, llava, target_modules=["linear_1"])
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    state["language_model.model.layers.1.mlp.up_proj.weight"] *= 1.05
    save_file(state, file, {"format": "pt"})
    with pytest.raises(LoRAError, match=r"another base: values of 'model\.language_model\.layers\.1\.mlp\.up_proj"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["gate_proj"]}])
def test_a_layer_that_is_a_part_of_a_files_tensor_is_refused_with_a_remedy_that_works(
    tmp_path, options: dict[str, Any]
):
    network = base_and_adapter(tmp_path, dinov2, **options)
    with pytest.raises(LoRAError, match=rf"'{SWIGLU}\.(weight|bias)' is no tensor there.*load_adapter and save_merged"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = type(network).from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    save_merged(again, tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)


def test_layers_beside_parts_of_a_files_tensor_are_merged(tmp_path):
    network = base_and_adapter(tmp_path, dinov2, exclude_modules=["gate_proj", "up_proj"])
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)


def test_a_file_with_the_modules_names_is_merged_without_asking_transformers(tmp_path, monkeypatch):
    network = base_and_adapter(tmp_path, bert)
    monkeypatch.setattr("lightning_lora.command.merge.names_in_transformers", lambda base: pytest.fail("it was asked"))
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)


def edit_config(base: Path, **options: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | options))


def test_code_that_a_folder_brings_along_is_not_run(tmp_path):
    """transformers would ask for auto_map's files, and for the Hub's repository of a kernel."""
    network = base_and_adapter(tmp_path, vit)
    (tmp_path / "base" / "hostile.py").write_text("raise SystemExit('code was run')")
    edit_config(
        tmp_path / "base",
        auto_map={"AutoModel": "hostile.ViTForImageClassification"},
        _attn_implementation="someone/kernel",
        attn_implementation="someone/kernel",
    )
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    edit_config(tmp_path / "out", auto_map=None, _attn_implementation=None, attn_implementation=None)
    assert_loads_as(tmp_path / "out", network)


@pytest.mark.parametrize(
    ("architectures", "transformers_is_old"),
    [(["ViTForImageClassification"], True), (["ViTConfig"], False), (["os"], False), (["NoSuchModel"], False)]
    + [(kinds, False) for kinds in ([], None, [3], "ViTForImageClassification")],
)
def test_names_that_nobody_tells_are_refused_with_what_would_tell_them(
    tmp_path, monkeypatch, architectures: Any, transformers_is_old: bool
):
    base_and_adapter(tmp_path, vit)
    edit_config(tmp_path / "base", architectures=architectures)
    if transformers_is_old:
        monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(LoRAError, match=r"exactly one prefix; found none.*transformers 5, .*--rename OLD=NEW"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_configuration_that_its_class_refuses_is_named_where_names_do_not_fit(tmp_path):
    network = base_and_adapter(tmp_path, vit)
    edit_config(tmp_path / "base", hidden_size="wide")
    with pytest.raises(LoRAError, match=r"found none.*cannot build ViTForImageClassification: .*'wide'.*--rename"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    state = {f"other.{name}": tensor for name, tensor in seeded(vit).state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors")  # a prefix is found without transformers
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[f"other.{name}"], value) for name, value in merged_state_dict(network).items())


# --- --rename ---


def test_rename_merges_a_lone_file_by_expressions_one_after_the_other(tmp_path, capsys):
    network = base_and_adapter(tmp_path, vit)
    file = tmp_path / "base" / "model.safetensors"
    given = ["merge", "--base", file, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out.safetensors"]
    assert "--rename OLD=NEW" in refused(capsys, *given)
    call(capsys, *given, "--rename", *VIT_NAMES)
    check_merge_command(*given, "--rename", *VIT_NAMES)
    (tmp_path / "out.safetensors").replace(file)
    assert_loads_as(tmp_path / "base", network)


def test_rename_goes_before_what_transformers_would_say(tmp_path, monkeypatch):
    network = base_and_adapter(tmp_path, vit)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=VIT_NAMES)
    monkeypatch.undo()
    assert_loads_as(tmp_path / "out", network)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("nothing", "must be OLD=NEW"),
        ("=x", "must be OLD=NEW"),
        ("(=x", "no regular expression"),
        (r"vit=\2", "no regular expression"),
        ("absent=x", r"'absent=x' changes no name of .*there are 'classifier\.bias'"),
        (r"weight|bias=x", r"both become 'classifier\.x'"),
    ],
)
def test_a_rename_that_cannot_be_meant_is_refused(tmp_path, pair: str, message: str):
    base_and_adapter(tmp_path, vit)
    with pytest.raises(LoRAError, match=message):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=[pair])
    assert not (tmp_path / "out").exists()
