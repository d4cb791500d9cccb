"""Which modules an option means: PEFT's rules on random names and on transformers models."""

from __future__ import annotations

import logging
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, save_adapter
from lightning_lora.model.targets import select
from lightning_lora.nn.tied_weights import tied_weights
from support.runs.notices import PEER_NOTICES

SEGMENTS = ["a", "b", "ab", "0", "1", "q"]
NAMES = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=4).map(".".join)
REGEXES = st.sampled_from([r".*\.a", r"a|b", r".*", r"(a|b)\.\d+(\..*)?", r".*q", r"a.b", r".*b\.[^.]+"])


def tree(names: list[str]) -> nn.Module:
    """A model in which each name and each of its dotted prefixes is a linear layer."""
    root = nn.Module()
    for name in names:
        module = root
        for segment in name.split("."):
            if segment not in module._modules:
                module.add_module(segment, nn.Linear(1, 1))
            module = module._modules[segment]
    return root


@settings(max_examples=60)
@given(
    names=st.lists(NAMES, min_size=1, max_size=6),
    targets=st.lists(NAMES, min_size=1, max_size=3) | REGEXES,
    excluded=st.none() | st.lists(NAMES, min_size=1, max_size=2) | REGEXES,
    saved=st.none() | st.lists(NAMES, min_size=1, max_size=2),
)
def test_targets_and_exclusions_match_as_in_peft(names, targets, excluded, saved):
    model = tree(names)
    theirs = peft.LoraConfig(target_modules=targets, exclude_modules=excluded, modules_to_save=saved)
    expected = [n for n, _ in model.named_modules() if n and check_target_module_exists(theirs, n)]
    ours = LoRAConfig(target_modules=targets, exclude_modules=excluded, modules_to_save=saved)
    assert list(select(list(model.named_modules()), ours).layers) == expected


NUMBERED = st.lists(st.sampled_from(["a", "b", "h", "0", "1", "q"]), min_size=1, max_size=5).map(".".join)
PATTERNS = st.sampled_from(["h", "a", "h|a", "(a|h)", r"[^.]*", "a.b", "0", ""])


@settings(max_examples=60)
@given(
    names=st.lists(NUMBERED, min_size=1, max_size=6),
    targets=st.lists(NUMBERED | st.just("q"), min_size=1, max_size=3),
    numbers=st.integers(0, 1) | st.lists(st.integers(0, 2), max_size=2),
    pattern=st.none() | PATTERNS | st.lists(PATTERNS.filter(bool), max_size=2),
)
@example(names=["b.h.0.q", "b.a.0.q", "a.h.0.q"], targets=["q"], numbers=[0], pattern="h|a")
@example(names=["h.0.a.1.q"], targets=["q"], numbers=[1], pattern=["a", "h"])
@example(names=["h.0.a.1.q"], targets=["q"], numbers=[1], pattern=["h", "a"])
def test_layers_by_number_match_as_in_peft(names, targets, numbers, pattern):
    model = tree(names)
    by_number = {"layers_to_transform": numbers, "layers_pattern": pattern if numbers != [] else None}
    theirs = peft.LoraConfig(target_modules=targets, **by_number)
    expected = [n for n, _ in model.named_modules() if n and check_target_module_exists(theirs, n)]
    ours = LoRAConfig(target_modules=targets, **by_number)
    assert list(select(list(model.named_modules()), ours).layers) == expected


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )


def classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(bert().config)


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (gpt2, "all-linear"),
        (bert, "all-linear"),
        (classifier, "all-linear"),
        (gpt2, r".*\.h\.1\..*c_(attn|fc)"),
        (bert, ["query", "attention.output.dense"]),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT's remark on Conv1D
def test_layers_of_transformers_models_are_those_of_peft(build, targets):
    expected = peft.LoraModel(build(), peft.LoraConfig(target_modules=targets), "default").targeted_module_names
    assert sorted(inject(build(), LoRAConfig(target_modules=targets))) == sorted(expected) != []


def nested() -> nn.Module:
    return tree([f"model.layers.{i}.experts.{j}.{name}" for i in range(3) for j in range(2) for name in "qk"])


def at_root() -> nn.Module:
    return tree([f"layers.{i}.{name}" for i in range(3) for name in "qk"])


@pytest.mark.parametrize(
    ("build", "options", "expected"),
    [
        (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1}, ["model.layers.1.self_attn.q_proj"]),
        (gpt2, {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"}, None),
        (
            nested,
            {"target_modules": ["q"], "layers_to_transform": 1},
            ["model.layers.1.experts.0.q", "model.layers.1.experts.1.q"],
        ),
        (
            at_root,
            {"target_modules": ["q", "layers.0.q"], "layers_to_transform": 1, "layers_pattern": ["layers"]},
            ["layers.0.q", "layers.1.q"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_layers_by_number_are_those_of_peft(build, options, expected):
    theirs = peft.LoraModel(build(), peft.LoraConfig(**options), "default").targeted_module_names
    assert sorted(inject(build(), LoRAConfig(**options))) == sorted(theirs) != []
    assert expected is None or sorted(theirs) == sorted(expected)


@pytest.mark.parametrize(
    ("build", "options", "there"),
    [
        (nested, {"layers_to_transform": [8, 7]}, "'8' names no layer .* are '0', '1', '2'"),
        (nested, {"layers_to_transform": 1, "layers_pattern": ["expert", "layer"]}, "'1' names no layer .* are none"),
        (nested, {"target_modules": ["model.layers.0.experts.0.q"], "layers_to_transform": 0}, "'0' names no .* none"),
    ],
)
def test_a_number_that_names_no_layer_is_an_error(build, options, there):
    with pytest.raises(LoRAError, match=f"layers_to_transform: {there}"):
        inject(build(), LoRAConfig(**{"target_modules": ["q"], **options}))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("build", [gpt2, bert])
def test_all_linear_finds_the_head_of_a_model_inside(build, caplog):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    alone = inject(build(), LoRAConfig())
    head = {gpt2: "lm_head", bert: "cls.predictions.decoder"}[build]
    assert head not in alone
    assert f"{head} is left out of 'all-linear': it is the output head" in caplog.text
    assert inject(Wrapped(build()), LoRAConfig()) == [f"inner.{name}" for name in alone] + ["extra"]


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2)
    return transformers.MambaForCausalLM(config)


@pytest.mark.filterwarnings(*PEER_NOTICES)
def test_all_linear_leaves_out_what_peft_refuses_in_mamba_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    mixer = "backbone.layers.0.mixer"
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.get_peft_model(mamba(), peft.LoraConfig(target_modules="all-linear"))
    adapted = inject(model := mamba(), LoRAConfig())
    assert adapted == [f"{mixer}.in_proj", f"{mixer}.x_proj", f"{mixer}.dt_proj"]
    assert f"{mixer}.out_proj is left out of 'all-linear': PEFT cannot adapt the out_proj of Mamba" in caplog.text
    save_adapter(model, tmp_path)
    assert peft.PeftModel.from_pretrained(mamba(), tmp_path).base_model.targeted_module_names == adapted
    assert inject(mamba(), LoRAConfig(target_modules=["out_proj"])) == [f"{mixer}.out_proj"]
    assert inject(Wrapped(mamba()), LoRAConfig()) == [*(f"inner.{name}" for name in adapted), "extra"]
    beside = nn.ModuleDict({"out_proj": nn.Linear(4, 4), "mamba": mamba()})
    assert inject(beside, LoRAConfig()) == ["out_proj", *(f"mamba.{name}" for name in adapted)]


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, and a layer that two names share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mid = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6)
        self.out.weight = self.embed.weight


def test_all_linear_leaves_out_a_tied_weight_and_logs_the_owner(caplog):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    assert inject(Tied(), LoRAConfig()) == ["mid"]
    assert "out is left out of 'all-linear': its weight is also embed.weight" in caplog.text


def test_tied_weights_of_three_owners_or_on_meta_are_found():
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    first.weight = second.weight = third.weight
    assert set(tied_weights(list(nn.Sequential(first, second, third).named_modules()))) == {first, second, third}
    with torch.device("meta"):
        model = Tied()
    assert set(tied_weights(list(model.named_modules()))) == {model.embed, model.out}


@pytest.mark.parametrize(("kind", "targets"), [(nn.Linear, "all-linear"), (nn.Embedding, ["layer"])])
def test_a_model_that_is_itself_a_layer_is_refused_with_how_to_give_it_a_name(kind: type[nn.Module], targets: Any):
    layer, name = kind(4, 4), kind.__name__
    with pytest.raises(
        LoRAError, match=rf"^inject: {name}: the model is itself a layer \({name}\), .* put it into one"
    ):
        inject(layer, LoRAConfig(r=2, target_modules=targets))
    assert inject(nn.Sequential(layer), LoRAConfig(r=2, target_modules=["0"])) == ["0"]


# --- nothing to adapt ---


def convolutions() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "blocks": nn.ModuleList(nn.ModuleDict({"dw": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}) for _ in "ab"),
            "table": nn.Embedding(3, 4),
        }
    )


def tied() -> nn.Module:
    net = nn.ModuleDict({"table": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
    net["out"].weight = net["table"].weight
    return net


@pytest.mark.parametrize(
    ("build", "options", "said", "followed"),
    [
        (convolutions, {}, "'stem', 'dw', 'table'", ["stem", "dw", "table"]),
        (tied, {}, r"'out' is left out: its weight is also table\.weight", ["out"]),
        (lambda: nn.Sequential(nn.LayerNorm(3)), {}, "no layer of a kind that can be adapted", None),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {"exclude_modules": ["0"]}, "takes out '0'", None),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2)), {"modules_to_save": ["1"]}, "takes out '1'", None),
    ],
)
def test_all_linear_that_leaves_nothing_says_what_there_is_and_how_to_name_it(
    build: Any, options: dict[str, Any], said: str, followed: list[str] | None
):
    with pytest.raises(LoRAError, match=f"target_modules: 'all-linear' leaves no layer to adapt.*{said}"):
        inject(build(), LoRAConfig(**options))
    if followed:
        assert {name.rpartition(".")[2] for name in inject(build(), LoRAConfig(target_modules=followed))} == {*followed}
