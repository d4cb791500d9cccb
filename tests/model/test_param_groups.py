"""lora_param_groups: each parameter's learning rate and weight decay, compared with peft's LoRA+."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

from lightning_lora import LoRAConfig, LoRAError, inject, lora_param_groups
from lightning_lora.nn.adapted_module import adapted_layers
from support.models.networks import Zoo, zoo_config
from support.models.peers import PEERS, model
from support.models.variants import define_gated, variants_forgotten
from support.runs.notices import PEER_NOTICES, TORCH_NOTICES

pytestmark = TORCH_NOTICES

RATES: dict[str, Any] = {"lr": 1e-3, "lr_ratio": 8, "weight_decay": 0.1}
Rule = tuple[float, float]  # learning rate and weight decay


def rules_of(net: nn.Module, groups: list[dict[str, Any]]) -> dict[str, Rule]:
    """The rule of each parameter by its name; one that is in two groups, or in none and trainable, is an error."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    rules = [(names[p], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(rules) == len(dict(rules))
    assert {name for name, _ in rules} == {name for name, p in net.named_parameters() if p.requires_grad}
    return dict(rules)


def ours_of(name: str) -> str:
    """peft's name of a parameter as this package has it."""
    name = name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")
    name = name.replace(".modules_to_save", "").replace("token_adapter.trainable_tokens_delta", "lora_rows")
    for factor in "AB":
        name = name.replace(f"lora_{factor}.weight", f"lora_{factor}").replace(
            f"lora_embedding_{factor}", f"lora_{factor}"
        )
    return name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "embedding, head": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "biases": ("bert", {"bias": "all", "modules_to_save": ["classifier"]}),
    "rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings(*PEER_NOTICES)
def test_rates_and_decay_are_pefts_but_of_vectors_and_rows(case: str):
    """LoRA+ is about A and B: peft, as its authors' code, multiplies the rate of every vector too, a trained bias."""
    name, options = CASES[case]
    options = {"r": 4, "target_modules": PEERS[name].targets, **options}
    ours, theirs = model(name), get_peft_model(model(name), LoraConfig(**options))  # type: ignore[arg-type]
    inject(ours, LoRAConfig(**options))
    plus = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1)
    peft = {ours_of(name): rule for name, rule in rules_of(theirs, plus.param_groups).items()}
    found = rules_of(ours, lora_param_groups(ours, **RATES))
    assert found.keys() == peft.keys()
    live = dict(ours.named_parameters())
    differing = {name for name in found if found[name] != pytest.approx(peft[name])}
    assert differing == {name for name in found if live[name].dim() == 1 or name.endswith("lora_rows")}
    for name in differing:
        assert found[name] == (1e-3, 0.0)
        if name.endswith("lora_rows"):
            assert peft[name] == pytest.approx((1e-3, 0.1))
        else:  # of norms, peft exempts those of transformers' list from decay, which is of nn.LayerNorm alone since 5
            exempt = isinstance(ours.get_submodule(name.rpartition(".")[0]), tuple(ALL_LAYERNORM_LAYERS))
            assert peft[name] == pytest.approx((8e-3, 0.0 if exempt or name.endswith("bias") else 0.1))
    assert (case == "llama") == (not differing)


def test_each_kind_of_parameter_has_the_rule_of_the_table():
    net = Zoo()
    inject(net, zoo_config())
    groups = lora_param_groups(net, **RATES, lr_embedding=1e-5)
    assert [group["name"] for group in groups] == ["lora_A", "lora_B", "lora_embedding", "other", "no_decay"]
    found = rules_of(net, groups)
    assert found["body.0.lora_A"] == found["conv.lora_A"] == found["head.weight"] == (1e-3, 0.1)
    assert found["body.0.lora_B"] == found["conv.lora_B"] == (8e-3, 0.1)
    assert found["embed.lora_A"] == found["embed.lora_B"] == (1e-5, 0.1)
    assert found["body.0.bias"] == found["head.bias"] == (1e-3, 0.0)


def test_factors_of_single_parameters_are_told_apart():
    net = nn.LSTM(4, 4)
    inject(net, LoRAConfig(r=2, target_modules=[], target_parameters=["weight_ih_l0", "weight_hh_l0"]))
    found = rules_of(net, lora_param_groups(net, **RATES))
    assert {name: rate for name, (rate, _) in found.items()} == {
        "lora_A_weight_ih_l0": 1e-3,
        "lora_B_weight_ih_l0": 8e-3,
        "lora_A_weight_hh_l0": 1e-3,
        "lora_B_weight_hh_l0": 8e-3,
    }


def test_what_is_not_given_is_the_papers_ratio_and_no_decay():
    inject(net := nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules=["0"]))
    rules = {group["name"]: (group["lr"], group["weight_decay"]) for group in lora_param_groups(net, lr=0.5)}
    assert rules == {"lora_A": (0.5, 0.0), "lora_B": (8.0, 0.0)}


def test_a_parameter_that_layers_share_comes_once():
    net = nn.ModuleDict({"emb": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["emb"].weight
    net["again"] = net["body"]
    inject(net, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices={"emb": [1, 2]}))
    groups = {group["name"]: group["params"] for group in lora_param_groups(net, **RATES)}
    assert {name: len(parameters) for name, parameters in groups.items()} == {"lora_A": 1, "lora_B": 1, "no_decay": 1}


def test_biases_of_more_dimensions_are_not_decayed():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, add_bias_kv=True)})
    inject(net, LoRAConfig(r=2, target_modules=["attention"]))
    for bias in (net["attention"].bias_k, net["attention"].bias_v):
        assert bias.requires_grad_().dim() == 3
    found = rules_of(net, lora_param_groups(net, **RATES))
    assert found["attention.bias_k"] == found["attention.bias_v"] == (1e-3, 0.0)


def test_magnitudes_of_an_embedding_are_no_factors_of_it():
    inject(net := Zoo(), zoo_config(use_dora=True, target_modules=["embed", "body.0"]))
    found = rules_of(net, lora_param_groups(net, **RATES))
    assert found["embed.lora_magnitude"] == found["body.0.lora_magnitude"] == (1e-3, 0.0)
    assert found["embed.lora_A"] == found["embed.lora_B"] == (1e-6, 0.1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lr": "1e-3"}, "lr must be a number from 0"),
        ({"lr": 1e-3, "lr_ratio": float("nan")}, "lr_ratio must be a number above 0"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be a number from 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(options: dict[str, Any], complaint: str):
    net = Zoo()
    inject(net, zoo_config())
    with pytest.raises(LoRAError, match=complaint):
        lora_param_groups(net, **options)
    with pytest.raises(LoRAError, match="lora_param_groups: Linear was not injected"):
        lora_param_groups(nn.Linear(2, 2), lr=1e-3)


def test_vectors_of_a_users_variant_get_no_decay():
    with variants_forgotten():
        define_gated()
        net = nn.Sequential(nn.Linear(4, 3))
        inject(net, LoRAConfig(r=2, target_modules=["0"], variant="gated"))
        leaves = {
            id(tensor): leaf.removeprefix("lora_gated_") for leaf, tensor in adapted_layers(net)["0"].stored().items()
        }
        found = lora_param_groups(net, lr=1.0)
    groups = {group["name"]: {leaves[id(p)] for p in group["params"]} for group in found}
    assert groups == {"other": {"a", "b"}, "no_decay": {"g"}}
