"""PEFT's modules_to_save takes every module whose name ends in an entry; bias="all"; modules called base_layer."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    export_adapter,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lightning_lora.model.adapted_model import open_model
from support.models.networks import checkpoint
from support.models.peers import SMALL, TENSORS, close, distilbert, logits, seeded, spread_
from support.runs.notices import quiet_peers

pytestmark = quiet_peers

OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 8}


def llama() -> nn.Module:
    """It has a norm and, in each layer, an input_layernorm; and no other head than lm_head."""
    return seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))


class Layered(nn.Module):
    """Modules that are called as PEFT's own wrappers are."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.base_layer = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"base_layer": nn.Linear(8, 8), "original_module": nn.Linear(8, 8)})
        self.modules_to_save = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        x = self.base_layer(x + self.mha(x, x, x, need_weights=False)[0])
        x = self.modules_to_save(self.inner["original_module"](self.inner["base_layer"](x).relu()))
        result: torch.Tensor = self.head(x)
        return result


def layered() -> nn.Module:
    return seeded(Layered)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "classifier": (distilbert, {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}),
    "norm": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "lm_head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "every bias and a module": (layered, {"target_modules": ["mha"], "bias": "all", "modules_to_save": ["head"]}),
    "every bias and two modules": (
        distilbert,
        {"target_modules": ["q_lin"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "base_layer": (layered, {"target_modules": ["base_layer"], "bias": "lora_only"}),
    "base_layer and every bias": (layered, {"target_modules": ["base_layer", "head"], "bias": "all"}),
    "original_module": (layered, {"target_modules": ["original_module", "modules_to_save"], "bias": "all"}),
}
every_case = pytest.mark.parametrize("case", CASES)


def by_peft(case: str, path: Path, **options: Any) -> peft.PeftModel:
    build, own_options = CASES[case]
    options = json.loads(json.dumps({**OPTIONS, **own_options, **options}))  # peft changes them
    net = peft.get_peft_model(build(), peft.LoraConfig(**options))
    spread_(net)
    net.save_pretrained(str(path))
    return net.eval()


def by_us(case: str, path: Path, **options: Any) -> nn.Module:
    build, own_options = CASES[case]
    net = build()
    inject(net, LoRAConfig(**{**OPTIONS, **own_options, **options}))
    spread_(net)
    save_adapter(net, path)
    return net


@every_case
def test_a_folder_of_peft_gives_the_same_outputs_here_and_in_peft_again(tmp_path, case: str):
    other, net = by_peft(case, tmp_path / "a"), CASES[case][0]()
    before = logits(net)
    load_adapter(net, tmp_path / "a")
    assert (logits(net) - before).abs().max() > 1e-3
    close(logits(net), logits(other))
    save_adapter(net, tmp_path / "b")
    close(logits(peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path / "b").eval()), logits(other))


@every_case
def test_our_folder_gives_the_same_outputs_in_peft_and_the_same_bits_here(tmp_path, case: str):
    net, fresh = by_us(case, tmp_path), CASES[case][0]()
    close(logits(peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path).eval()), logits(net))
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(net))
    assert adapter_state_dict(fresh).keys() == adapter_state_dict(net).keys()
    assert open_model(fresh, "test").injection.config == open_model(net, "test").injection.config


def test_modules_that_an_entry_of_peft_takes_in_the_middle_of_a_name_are_trained_too(tmp_path):
    by_peft("classifier", tmp_path / "a")
    load_adapter(net := distilbert(), tmp_path / "a")
    assert open_model(net, "test").injection.config.modules_to_save == ("classifier", "pre_classifier")
    assert net.pre_classifier.weight.requires_grad
    by_peft("lm_head", tmp_path / "b", modules_to_save=["head"])
    load_adapter(net := llama(), tmp_path / "b")
    assert open_model(net, "test").injection.config.modules_to_save == ("lm_head",)


def test_a_frozen_module_that_peft_takes_is_stored_and_stays_frozen_here(tmp_path):
    by_us("classifier", tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    stored = tensors["base_model.model.pre_classifier.weight"]
    assert torch.equal(stored, distilbert().pre_classifier.weight)
    load_adapter(net := distilbert(), tmp_path)
    assert not net.pre_classifier.weight.requires_grad
    assert "pre_classifier.weight" not in adapter_state_dict(net)
    save_adapter(read_adapter(tmp_path), tmp_path / "again")
    with pytest.raises(LoRAError, match=r"wants 'pre_classifier.bias' in the file.*save_adapter"):
        export_adapter(checkpoint(net, "adapter"), tmp_path / "b")  # needs the base
    for name in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_an_entry_that_peft_would_take_for_an_adapted_layer_is_refused(tmp_path):
    net = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    inject(net, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["proj"]))
    with pytest.raises(LoRAError, match=r"'q_proj', which is adapted, .* train with 'q_proj' in modules_to_save"):
        save_adapter(net, tmp_path / "a")
    net = nn.ModuleDict({"layer": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})  # PEFT makes a q_proj.base_layer
    inject(net, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["layer"]))
    with pytest.raises(LoRAError, match="so that 'q_proj', which is adapted, would be fully trained too"):
        save_adapter(net, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Packed(nn.Module):
    """A quantized layer: its weight is of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(16, dtype=torch.uint8).view(4, 4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.float()


def packed() -> nn.Module:
    return seeded(lambda: nn.Sequential(OrderedDict(body=nn.Linear(4, 4), pre_head=Packed(), head=nn.Linear(4, 2))))


def test_a_frozen_module_that_is_quantized_is_stored_and_compared_by_its_shape(tmp_path):
    inject(net := packed(), LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    spread_(net)
    save_adapter(net, tmp_path)
    assert "base_model.model.pre_head.weight" in load_file(tmp_path / TENSORS)
    load_adapter(again := packed(), tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), net(x))
