"""PEFT's adapters of single parameters, both ways: nn.LSTM, nn.GRU, stacks of experts, also those PEFT chooses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    merged,
    read_adapter,
    save_adapter,
)
from lightning_lora.command.main import main
from lightning_lora.formats.peft_names import read_names
from lightning_lora.nn.adapted_module import adapted_layers
from support.files.expected_weights import check_merge_command
from support.models.parameters import CASES, Experts, Model, Projected, fill_factors_
from support.models.peers import CONFIG, TENSORS, close, edit, redescribe
from support.runs.notices import quiet_peers

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # Said by peft of patterns for parameters, which it applies.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
STACKS = ("gate_up_proj", "down_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "Llama4": {"intermediate_size_mlp": 12, "num_local_experts": 3, "head_dim": 8},
}


NAMES = [*CASES, *(pytest.param(name, marks=pytest.mark.transformers_5) for name in EXPERTS)]  # older: no stacks


def model(name: str) -> Any:
    torch.manual_seed(0)
    if name in CASES:
        return Model(CASES[name].build()).eval()
    prefix = f"{name}Text" if name == "Llama4" else name
    config = getattr(transformers, f"{prefix}Config")(**SIZES | EXPERTS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def output(net: Any) -> torch.Tensor:
    torch.manual_seed(1)
    is_language_model = hasattr(net, "config") and hasattr(net.config, "vocab_size")
    result = net(torch.arange(10)[None]).logits if is_language_model else net(torch.randn(2, 4, 5))
    return result.detach()


def targets(name: str) -> list[str]:
    return list(CASES[name].targets) if name in CASES else list(STACKS)


def peft_folder(net: Any, folder: Path, **options: Any) -> torch.Tensor:
    """What peft saves of a filled adapter; returns that model's output."""
    theirs = peft.get_peft_model(net, peft.LoraConfig(**options))
    fill_factors_(theirs)
    theirs.save_pretrained(folder)
    return output(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_each_computes_what_the_other_saved(tmp_path, name: str):
    ours, options = model(name), {"r": 4, "lora_alpha": 6, "use_rslora": len(name) % 2 == 0}
    parameters = targets(name)
    inject(
        ours, LoRAConfig(target_modules=[], target_parameters=parameters, rank_pattern={parameters[0]: 2}, **options)
    )
    fill_factors_(ours)
    save_adapter(ours, tmp_path / "own")
    expected = output(ours)
    assert not torch.allclose(expected, output(model(name)), rtol=1e-3)
    close(output(peft.PeftModel.from_pretrained(model(name), tmp_path / "own")), expected)
    load_adapter(again := model(name), tmp_path / "own")
    assert torch.equal(output(again), expected)

    expected = peft_folder(model(name), tmp_path / "theirs", r=2, target_modules=[], target_parameters=parameters)
    names = load_adapter(read := model(name), tmp_path / "theirs")
    assert len(names) == (CASES[name].adapted if name in CASES else 2)
    close(output(read), expected)
    with merged(read):
        close(output(read), expected)
    save_adapter(read, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.transformers_5
@pytest.mark.parametrize(
    ("name", "modules"), [("Mixtral", ["q_proj", "w1", "w2", "w3"]), ("Qwen3Moe", "all-linear")], ids=str
)
def test_what_peft_makes_of_layers_that_became_stacks_is_read(tmp_path, name: str, modules: Any):
    expected = peft_folder(model(name), tmp_path / "theirs", r=2, target_modules=modules)
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["target_parameters"]
    ours = model(name)
    load_adapter(ours, tmp_path / "theirs")
    close(output(ours), expected)
    ranks = {layer.lora.spec.r for key, layer in adapted_layers(ours).items() if key.endswith("gate_up_proj")}
    assert ranks == {4}
    save_adapter(ours, tmp_path / "ours")
    close(output(peft.PeftModel.from_pretrained(model(name), tmp_path / "ours")), expected)


class Reversed(Experts):
    """Registers its parameters in another order than transformers does, and one more between them."""

    def __init__(self) -> None:
        super().__init__()
        up = self._parameters.pop("gate_up_proj")
        self.middle, self.gate_up_proj = nn.Parameter(torch.randn(5, 5)), up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ self.middle


def test_the_order_in_which_a_module_registers_its_parameters_decides(tmp_path, capsys):
    torch.manual_seed(0)
    plain = Model(Reversed()).eval()
    parameters = ["gate_up_proj", "down_proj", "middle"]
    expected = peft_folder(copy.deepcopy(plain), tmp_path / "a", target_modules=[], target_parameters=parameters)
    ours = copy.deepcopy(plain)
    load_adapter(ours, tmp_path / "a")
    close(output(ours), expected)
    save_adapter(ours, tmp_path / "b")
    close(output(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "b")), expected)
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path / "b")
    assert torch.equal(output(again), output(ours))
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "c")]) == 0  # without a model
    close(output(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "c")), expected)
    assert main(["info", str(tmp_path / "a")]) == 1  # no model at hand, and the order is not the usual one
    assert "'inner' has adapters of 3 parameters" in capsys.readouterr().err


def test_an_adapter_that_was_read_without_its_model_is_refused_where_that_has_another_order(tmp_path: Path):
    torch.manual_seed(0)
    plain, usual = Model(Reversed()).eval(), Model(Experts()).eval()
    folder, options = tmp_path / "folder", {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    expected = peft_folder(copy.deepcopy(plain), folder, **options)
    adapter = read_adapter(folder)
    with pytest.raises(LoRAError, match=r"registers \['down_proj', 'gate_up_proj'\]. Pass the folder itself"):
        load_adapter(plain, adapter)
    save_adapter(adapter, tmp_path / "written again without the model")
    with pytest.raises(LoRAError, match=r"registers \['down_proj', 'gate_up_proj'\]"):
        load_adapter(plain, tmp_path / "written again without the model")
    load_adapter(plain, folder)
    close(output(plain), expected)
    of_usual = peft_folder(copy.deepcopy(usual), tmp_path / "usual", **options)
    load_adapter(usual, read_adapter(tmp_path / "usual"))
    close(output(usual), of_usual)


def test_names_come_in_the_order_of_registration_whatever_the_files_order_is():
    """Files of torch.save keep the order of the model, in which the last parameter comes first."""
    names = [
        f"base_model.model.m{wrappers}.lora_A.weight" for wrappers in ("", ".base_layer", ".base_layer.base_layer")
    ]
    read = read_names(names, "a file", lambda wrapped: {"m": ["first", "second", "third"]})
    assert list(read.ours.values()) == ["m.lora_A_first", "m.lora_A_second", "m.lora_A_third"]


def test_adapters_that_the_options_do_not_name_are_refused(tmp_path):
    peft_folder(model("lstm"), tmp_path, target_modules=[], target_parameters=["weight_ih_l0", "weight_hh_l0"])
    edit(tmp_path, target_parameters=["weight_ih_l0"])
    with pytest.raises(LoRAError, match=r"'inner\.rnn' has adapters of 2 parameters, and target_parameters="):
        load_adapter(model("lstm"), tmp_path)
    edit(tmp_path, target_parameters=[])
    with pytest.raises(LoRAError, match="belongs to target_parameters, which cannot be applied"):
        load_adapter(model("lstm"), tmp_path)


def test_a_stack_of_another_rank_than_the_options_say_or_with_other_columns_is_refused(tmp_path):
    peft_folder(model("experts"), tmp_path, r=2, target_modules=[], target_parameters=["down_proj"])
    for rank in (1, 3):
        edit(tmp_path, r=rank)
        with pytest.raises(LoRAError, match=r"down_proj.*(no stack of rank 3|must have shape|say r=1)"):
            load_adapter(model("experts"), tmp_path)
    edit(tmp_path, r=2)
    tensors = load_file(tmp_path / TENSORS)
    (b,) = (name for name in tensors if "lora_B" in name)
    for columns in (3, 12):
        save_file(tensors | {b: tensors[b].repeat(1, 3)[:, :columns].contiguous()}, tmp_path / TENSORS)
        with pytest.raises(LoRAError, match=r"down_proj': A .* and B .* are no stack of rank 2"):
            load_adapter(model("experts"), tmp_path)


def test_a_parameter_of_the_model_itself_is_refused_when_it_is_saved(tmp_path):
    ours = Projected()
    inject(ours, LoRAConfig(target_modules=[], target_parameters=["projection"]))
    with pytest.raises(LoRAError, match="'projection' belongs to the model itself, to which PEFT gives no adapter"):
        save_adapter(ours, tmp_path / "a")


@pytest.mark.parametrize("name", ["lstm, projected, both ways", "transposed experts"])
def test_the_command_merges_single_parameters(tmp_path, name: str, capsys, monkeypatch):
    monkeypatch.setattr("lightning_lora.nn.exact_merge.CPU_CHUNK", 30)  # an expert at a time
    ours = model(name)
    save_file(dict(ours.state_dict()), tmp_path / "base.safetensors")
    inject(ours, LoRAConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets(name)))
    fill_factors_(ours)
    save_adapter(ours, tmp_path / "adapter")
    arguments = ["--base", str(tmp_path / "base.safetensors"), "--output", str(tmp_path / "merged.safetensors")]
    assert main(["merge", *arguments, "--adapter", str(tmp_path / "adapter")]) == 0, capsys.readouterr()
    check_merge_command(*arguments, "--adapter", str(tmp_path / "adapter"))
    result = load_file(tmp_path / "merged.safetensors")
    with merged(ours):
        for key, value in result.items():
            assert torch.equal(value, ours.get_parameter(key)), key


@pytest.mark.parametrize("damage", [[], {"inner.rnn": [1]}])
def test_a_damaged_description_is_refused(tmp_path, damage: Any):
    ours = model("lstm")
    inject(ours, LoRAConfig(target_modules=[], target_parameters=["weight_ih_l0", "weight_hh_l0"]))
    save_adapter(ours, tmp_path)
    redescribe(tmp_path, parameters=damage)
    with pytest.raises(LoRAError, match=r"description is damaged|target_parameters|missing|no place"):
        load_adapter(model("lstm"), tmp_path)
