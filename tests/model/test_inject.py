"""inject: what stays as it was, what is frozen, what is refused, and that a failure leaves no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, is_merged, load_adapter, merge, save_adapter, unload
from lightning_lora.nn import lora
from lightning_lora.nn.adapted_module import adapted_layers
from support.models.networks import (
    ZOO_LAYERS,
    OwnLinear,
    Stubborn,
    Zoo,
    checkpoint,
    randomise_,
    state_bits,
    tokens,
    trace,
    zoo_config,
)

pytestmark = pytest.mark.core


def test_inject_keeps_tree_names_order_identity_memory_and_classes():
    model = Zoo()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    types = {name: type(module) for name, module in modules.items()}
    addresses = {name: p.data_ptr() for name, p in parameters.items()}
    state = state_bits(model)

    assert inject(model, zoo_config()) == ZOO_LAYERS

    assert list(model.named_modules()) == list(modules.items())  # names, order and objects
    base = [(name, p) for name, p in model.named_parameters() if not name.endswith(("lora_A", "lora_B"))]
    assert [name for name, _ in base] == list(parameters)
    assert all(p is parameters[name] and p.data_ptr() == addresses[name] for name, p in base)
    added = [name for name in model.state_dict() if name not in state]
    assert added == [f"{layer}.{factor}" for layer in ZOO_LAYERS for factor in ("lora_A", "lora_B")]
    assert {name: value for name, value in state_bits(model).items() if name not in added} == state
    assert all(isinstance(module, types[name]) for name, module in modules.items())
    assert isinstance(model.body[0], OwnLinear)
    assert all(type(m) is types[n] for n, m in modules.items() if n not in ZOO_LAYERS)


@pytest.mark.parametrize(("bias", "saved"), [("none", ["head"]), ("all", ["norm", "body.1"]), ("lora_only", None)])
def test_what_is_trainable_is_what_peft_trains(bias, saved):
    options: dict[str, Any] = {"target_modules": ["embed", "body.0", "conv"], "modules_to_save": saved, "bias": bias}
    theirs = peft.get_peft_model(Zoo(), peft.LoraConfig(**options))
    expected = {_our_name(name) for name, p in theirs.named_parameters() if p.requires_grad}
    model = Zoo()
    inject(model, LoRAConfig(**options))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


class Norms(Zoo):
    """Modules whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.final_norm, self.prenorm = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.pre_classifier, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)


@pytest.mark.parametrize(
    ("entries", "task"),
    [(["norm"], None), (["prenorm.1", "fier"], "SEQ_CLS"), (["l_norm", "body.1"], None), (None, "SEQ_CLS")],
)
def test_modules_to_save_of_a_peft_config_are_those_that_peft_trains(tmp_path, entries, task):
    def config() -> peft.LoraConfig:  # get_peft_model changes it
        return peft.LoraConfig(target_modules=["embed", "body.0", "body.3"], modules_to_save=entries, task_type=task)

    base = Norms()
    theirs = peft.get_peft_model(_prepared(copy.deepcopy(base)), config())
    expected = {_our_name(name) for name, p in theirs.named_parameters() if p.requires_grad}
    inject(model := copy.deepcopy(base), config())
    inject(model, config())  # the same options: nothing to refuse
    assert _trainable(model) == expected
    randomise_(model)
    save_adapter(model, tmp_path / "folder")
    for source in (tmp_path / "folder", checkpoint(model, "adapter")):
        load_adapter(again := copy.deepcopy(base), source)
        assert _trainable(again) == expected
        assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters() if p.requires_grad)
    there = peft.PeftModel.from_pretrained(_prepared(copy.deepcopy(base)), tmp_path / "folder", is_trainable=True)
    assert {_our_name(name) for name, p in there.named_parameters() if p.requires_grad} == expected


def _prepared(model: nn.Module) -> nn.Module:
    """A model with the method that PEFT keeps of models for a task."""
    model.prepare_inputs_for_generation = None  # type: ignore[assignment]
    return model


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
    name = name.replace(".lora_embedding_", ".lora_")
    return name.removesuffix(".default.weight").removesuffix(".default") if "lora_" in name else name


def test_parameters_frozen_before_stay_frozen_unless_an_option_trains_them():
    model = Zoo()
    model.requires_grad_(False)
    inject(model, zoo_config())
    trainable = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*ZOO_LAYERS, "head"}
    unload(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_modules_to_save_wins_over_target_modules():
    model = Zoo()
    assert inject(model, zoo_config(target_modules=["0", "3", "head"], modules_to_save=["body"])) == ["head"]
    assert all(p.requires_grad for p in model.body.parameters())


@pytest.mark.parametrize("rslora", [True, False])
def test_ranks_and_scalings_are_those_of_peft(rslora):
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["embed", "conv", "body.0", "body.3"],
        "rank_pattern": {"0": 2, r"body\.\d": 3},
        "alpha_pattern": {"conv|embed": 5, "^body.3": 7},
        "use_rslora": rslora,
    }
    theirs = peft.LoraModel(Zoo(), peft.LoraConfig(**options), "default").model
    model = Zoo()
    inject(model, LoRAConfig(**options))
    for name in ZOO_LAYERS:
        layer, reference = model.get_submodule(name), theirs.get_submodule(name)
        assert layer.lora.spec.scaling == reference.scaling["default"]
        assert layer.lora_B.shape[1] == layer.lora_A.shape[0] == reference.r["default"]
    assert [model.get_submodule(name).lora.spec.r for name in ZOO_LAYERS] == [4, 4, 2, 3]


@pytest.mark.parametrize(
    ("targets", "ranks", "alphas"),
    [
        (["mixer", "self_attn"], {"mixer": 2}, {"mixer": 3}),
        (["mixer", "self_attn", "out_proj"], {".*out_proj|mixer": 2}, {}),
        (r"mixer|.*self_attn", {"self_attn|lin": 5}, {"^mixer$": 7}),
    ],
)
def test_attention_has_one_rank_and_scaling_by_its_own_name_as_in_peft(tmp_path, targets, ranks, alphas):
    base = nn.ModuleDict({"mixer": nn.MultiheadAttention(8, 2), "layer": nn.TransformerEncoderLayer(8, 2, 16)})
    options: dict[str, Any] = {"r": 4, "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas}
    theirs = peft.LoraModel(copy.deepcopy(base), peft.LoraConfig(**options), "default").model
    of_peft = {
        name.replace(".base_layer", ""): each for name, each in theirs.named_modules() if hasattr(each, "scaling")
    }
    expected = {name: (each.r["default"], each.scaling["default"]) for name, each in of_peft.items()}

    def found(model: nn.Module) -> dict[str, Any]:
        return {name: (each.lora.spec.r, each.lora.spec.scaling) for name, each in adapted_layers(model).items()}

    inject(model := copy.deepcopy(base), LoRAConfig(**options))
    assert found(model) == expected
    randomise_(model)
    load_adapter(again := copy.deepcopy(base), checkpoint(model, "adapter"))
    assert found(again) == expected
    if "out_proj" not in targets:
        save_adapter(model, tmp_path / "folder")
        load_adapter(again := copy.deepcopy(base), tmp_path / "folder")
        assert found(again) == expected


@pytest.mark.parametrize(("error", "after"), [(RuntimeError("out of memory"), 0), (KeyboardInterrupt(), 3)])
def test_inject_that_fails_half_way_leaves_no_trace(monkeypatch, error, after):
    model = Stubborn(nn.Linear(4, 4))
    before, calls = trace(model), []
    original = lora.initial_factors

    def failing(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args)
        if len(calls) > after:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(lora, "initial_factors", failing)
    with pytest.raises(type(error)):
        inject(model, LoRAConfig(bias="all", modules_to_save=["head"]), merge_weights=True)
    assert len(calls) == after + 1
    assert trace(model) == before


def test_inject_again_with_the_same_config_changes_nothing():
    model = Zoo()
    names = inject(model, zoo_config())
    randomise_(model)
    model.norm.weight.requires_grad_(True)  # what the user does afterwards stays too
    before = trace(model)
    assert inject(model, zoo_config()) == names
    assert trace(model) == before
    merge(model)
    assert inject(model, zoo_config()) == names
    assert is_merged(model)


def test_inject_again_with_another_config_is_refused_by_option():
    model = Zoo()
    inject(model, zoo_config())
    before = trace(model)
    with pytest.raises(LoRAError, match=r"other options \(r was 2, now 3, bias was 'lora_only', now 'all'\); unload"):
        inject(model, zoo_config(r=3, bias="all"))
    with pytest.raises(LoRAError, match="merge_weights=False"):
        inject(model, zoo_config(), merge_weights=True)
    assert trace(model) == before


def test_a_second_injection_around_or_inside_the_first_is_an_error():
    model = nn.ModuleDict({"inner": Zoo(), "other": nn.Linear(3, 3)})
    inject(model["inner"], zoo_config())
    before = trace(model)
    with pytest.raises(LoRAError, match="'inner' inside ModuleDict was injected already; unload it first"):
        inject(model, LoRAConfig(target_modules=["other"]))
    with pytest.raises(LoRAError, match="adapted already"):
        inject(model["inner"].body, LoRAConfig(target_modules=["0"]))
    with pytest.raises(LoRAError, match="adapted already"):
        inject(model["inner"].body, zoo_config())
    assert trace(model) == before
    assert inject(model["inner"], zoo_config()) == ZOO_LAYERS


def test_a_part_of_an_injected_model_that_holds_all_its_layers_is_named_as_a_part_of_the_model():
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(3, 3)), "other": nn.Linear(3, 3)})
    inject(model, LoRAConfig(target_modules=["inner.0"]))
    with pytest.raises(LoRAError, match="'inner' inside ModuleDict was injected already; unload it first"):
        inject(model["inner"], LoRAConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("copied", "state"), [(copy.deepcopy, "merged"), (lambda model: pickle.loads(pickle.dumps(model)), "unmerged")]
)
def test_copy_of_an_injected_model_is_whole_and_independent(copied, state):
    model = Zoo().eval()
    inject(model, zoo_config())
    randomise_(model)
    merge(model) if state == "merged" else None
    other = copied(model)
    bits, output = state_bits(model), model(tokens())
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(other(tokens()), output)
    assert is_merged(other) == (state == "merged")
    randomise_(other, 1.0)
    unload(other)
    assert state_bits(model) == bits
    assert torch.equal(model(tokens()), output)
    assert {n: b for n, b in bits.items() if "lora_" not in n} == state_bits(other)


# --- what is given as the config ---


@pytest.mark.parametrize("config", [{"r": 8}, None])
def test_anything_else_is_refused(config: Any):
    net = nn.Sequential(nn.Linear(3, 3))
    for door in (lambda: inject(net, config), lambda: LoRAConfig.from_peft(config)):
        with pytest.raises(LoRAError, match=r"expected a (LoRAConfig or a )?peft.LoraConfig, found "):
            door()
    assert type(net[0]) is nn.Linear


def test_biases_that_are_trained_with_all_are_those_of_that_very_name():
    """As in PEFT, which leaves in_proj_bias frozen."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "body": nn.Linear(8, 8)})
    model["body"].bias_of_another_kind = nn.Parameter(torch.zeros(8))
    inject(model, LoRAConfig(r=2, target_modules=["body"], bias="all"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"attention.out_proj.bias", "body.bias"}
