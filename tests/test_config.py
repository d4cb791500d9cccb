"""LoRAConfig: each option's validation, PEFT's defaults and pattern rules, plain types out and in."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import math
import re
import sys
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, LoRAError, inject
from lightning_lora import config as config_file

REFUSED = [
    ("r", 0),
    ("r", 2.0),
    ("r", True),
    ("lora_alpha", 0),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 10**400),
    ("lora_alpha", True),
    ("lora_dropout", 1.0),
    ("lora_dropout", -0.1),
    ("target_modules", ""),
    ("target_modules", ["q_proj", ""]),
    ("target_modules", "q_(proj"),
    ("exclude_modules", ["", "a"]),
    ("exclude_modules", "a["),
    ("layers_to_transform", -1),
    ("layers_to_transform", [0, -1]),
    ("layers_to_transform", [1.0]),
    ("layers_pattern", ["h"]),  # without layers_to_transform
    ("layers_pattern", 3),
    ("modules_to_save", "head"),
    ("modules_to_save", [None]),
    ("trainable_token_indices", 3),
    ("trainable_token_indices", [True]),
    ("trainable_token_indices", [-1]),
    ("trainable_token_indices", [4, 4, 7]),
    ("trainable_token_indices", {"emb": []}),
    ("trainable_token_indices", {"emb": [3, -1]}),
    ("trainable_token_indices", {3: [3]}),
    ("task_type", "SEQ"),
    ("rank_pattern", ["q"]),
    ("rank_pattern", {"q": 0}),
    ("rank_pattern", {"q(": 4}),
    ("rank_pattern", {"(?i)a": 3}),  # PEFT's expression holds the key in its middle
    ("alpha_pattern", "q"),
    ("alpha_pattern", {"q": float("nan")}),
    ("alpha_pattern", {"*q": 4}),
    ("bias", "some"),
    ("use_rslora", 1),
    ("autocast_adapter_dtype", None),
    *(("init_lora_weights", value) for value in ("pisa", "pissa_niter_", "OLORA")),
    ("init_lora_weights", 1),
    ("enable_lora", [True]),
    ("enable_lora", {"qkv": [False, False]}),
    ("enable_lora", {"qkv": [1, 0]}),
    ("enable_lora", {"": [True]}),
    ("variant_options", ["d_initial"]),
    ("variant_options", {"d_initial": 0.1}),
]
OWN = ("enable_lora", "autocast_adapter_dtype", "variant", "variant_options")


@pytest.mark.parametrize(("option", "value"), REFUSED, ids=[f"{option}={value!r:.20}" for option, value in REFUSED])
def test_a_refused_value_and_its_option_are_in_the_message(option, value):
    with pytest.raises(LoRAError, match=rf"LoRAConfig: {option}") as caught:
        LoRAConfig(**{option: value})
    offending = [value, *value.values(), *value] if isinstance(value, dict) else [value]
    offending += [tuple(item) for item in offending if isinstance(item, list)]
    assert any(repr(item) in str(caught.value) for item in offending)


def test_repr_shows_what_differs_from_the_defaults_and_can_be_evaluated():
    assert repr(LoRAConfig()) == "LoRAConfig()"
    assert repr(LoRAConfig(r=8, lora_alpha=8.0)) == "LoRAConfig()"
    config = LoRAConfig(r=16, target_modules=["q_proj"], rank_pattern={r"a\.b": 2}, task_type="SEQ_CLS", bias="all")
    assert repr(config) == (
        "LoRAConfig(r=16, target_modules=('q_proj',), rank_pattern={'a\\\\.b': 2}, bias='all', task_type='SEQ_CLS')"
    )
    assert eval(repr(config)) == config


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": r".*\.q_proj", "layers_to_transform": 0}, "target_modules must be a list"),  # as in peft
        ({"use_dora": True, "init_lora_weights": "pissa"}, "does not start from the weight, with use_dora"),
        ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": ["h", ""]}, "layers_pattern"),
        ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h(?P<idx>x)"}, "layers_pattern"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank for init_lora_weights='orthogonal', but it is 3"),
        ({"init_lora_weights": "orthogonal", "r": 4, "rank_pattern": {"q": 5}}, "but it is 5"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], named: str):
    with pytest.raises(LoRAError, match=re.escape(named)):
        LoRAConfig(**options)


def test_patterns_of_a_users_own_code_run_as_they_are():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(net, LoRAConfig(r=2, target_modules="(0+)+", rank_pattern={r"(0|1)\1?": 3}))
    assert net[0].lora_A.shape == (3, 4)
    with pytest.raises(LoRAError, match=r"target_modules: '\(+\.\.\..* is not a regular expression"):
        LoRAConfig(target_modules="(" * 5000 + ")" * 5000)


def test_names_and_defaults_are_pefts():
    ours, theirs = LoRAConfig(), peft.LoraConfig()
    for field in dataclasses.fields(LoRAConfig):
        # PEFT chooses targets by model type, which a plain module has not.
        if field.name not in {*OWN, "target_modules"}:
            assert (getattr(ours, field.name) or None) == (getattr(theirs, field.name) or None), field.name
    default = inspect.signature(peft.get_peft_model).parameters["autocast_adapter_dtype"].default
    assert ours.autocast_adapter_dtype is default
    assert ours.target_modules == "all-linear"


def test_a_config_from_peft_has_the_same_options():
    options = {
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r"layers\.0\..*",
        "layers_to_transform": [0, 2],
        "layers_pattern": ["layers", "h"],
        "modules_to_save": ["head"],
        "trainable_token_indices": {"embed": [7, 2]},
        "task_type": "TOKEN_CLS",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 4},
        "bias": "lora_only",
        "use_rslora": True,
        "use_dora": True,
        "init_lora_weights": "gaussian",
    }
    names = {f.name for f in dataclasses.fields(LoRAConfig) if f.name not in OWN}
    assert set(options) == names - {"target_parameters"}  # which have no dropout
    theirs = peft.LoraConfig(**options, inference_mode=True, base_model_name_or_path="base", fan_in_fan_out=True)
    assert LoRAConfig.from_peft(theirs) == LoRAConfig(**options)
    parameters = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    assert LoRAConfig.from_peft(peft.LoraConfig(**parameters)) == LoRAConfig(**parameters)
    assert LoRAConfig.from_peft(peft.LoraConfig(target_modules={"b", "a"})).target_modules == ("a", "b")
    one = LoRAConfig.from_peft(peft.LoraConfig(target_modules=["b"], layers_to_transform=0, layers_pattern="h"))
    assert (one.layers_to_transform, one.layers_pattern) == ((0,), ("h",))
    every = LoRAConfig.from_peft(peft.LoraConfig(target_modules=["b"], layers_to_transform=[], layers_pattern=""))
    assert (every.layers_to_transform, every.layers_pattern) == (None, None)


# What holds an option of peft's that is not its default, and that LoRAConfig has not.
@pytest.mark.parametrize(
    ("option", "value"), [("lora_bias", True), ("layer_replication", [[0, 1]]), ("use_qalora", True)]
)
def test_what_a_config_from_peft_cannot_express_is_refused_by_name(option: str, value: Any):
    theirs = peft.LoraConfig(target_modules=["q"])
    setattr(theirs, option, value)
    with pytest.raises(LoRAError, match=rf"LoRAConfig\.from_peft: {option}=.* cannot be expressed"):
        LoRAConfig.from_peft(theirs)
    setattr(theirs, option, getattr(peft.LoraConfig(), option))
    theirs.ensure_weight_tying = True  # what peft says of ties is passed over
    assert LoRAConfig.from_peft(theirs) == LoRAConfig(target_modules=["q"])


def test_an_unknown_option_or_variant_is_named_with_what_there_is():
    with pytest.raises(LoRAError, match=r"an option is unknown: 'rank' .*; there are r, lora_alpha, "):
        LoRAConfig.from_dict({"rank": 8})
    with pytest.raises(LoRAError, match=r"variant must be one of .*did you mean 'dora'.*but it is 'dorra'"):
        LoRAConfig(variant="dorra")
    with pytest.raises(LoRAError, match=r"variant must be one of 'dora', .*'lora'.*, but it is 'my own'\.$"):
        LoRAConfig.from_dict({"variant": "my own"})


def test_a_config_from_peft_needs_a_config_that_says_what_to_adapt():
    with pytest.raises(LoRAError, match=r"expected a peft\.LoraConfig, found a LoKrConfig"):
        LoRAConfig.from_peft(peft.LoKrConfig())
    with pytest.raises(LoRAError, match="target_modules=None lets peft choose"):
        LoRAConfig.from_peft(peft.LoraConfig())
    with pytest.raises(LoRAError, match=r"init_lora_weights must be .*'mica'"):
        LoRAConfig.from_peft(peft.LoraConfig(target_modules=["q"], init_lora_weights="mica"))


SEGMENTS = st.sampled_from(["a", "b", "ab", "layers", "0", "1", "10", "q_proj"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)
PATTERNS = NAMES | st.sampled_from([r"a|b", r"layers\.\d+\..*", r"^a", r".*", r"[^.]*_proj", r"1", r"\d", "b.a"])


@given(patterns=st.lists(PATTERNS, max_size=4, unique=True), name=NAMES, rslora=st.booleans())
def test_config_looks_patterns_up_and_scales_as_peft_does_with_and_without_rslora(patterns, name, rslora):
    ranks = {pattern: 10 + i for i, pattern in enumerate(patterns)}
    alphas = {pattern: 0.5 + i for i, pattern in enumerate(reversed(patterns))}
    config = LoRAConfig(r=3, lora_alpha=7, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    rank = ranks.get(get_pattern_key(ranks.keys(), name), 3)
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), 7)
    assert (config.rank(name), config.alpha(name)) == (rank, alpha)
    assert config.scaling(name) == alpha / (math.sqrt(rank) if rslora else rank)


ROWS = st.lists(st.integers(0, 99), unique=True)
CONFIGS = st.builds(
    LoRAConfig,
    r=st.integers(1, 64).map(lambda half: 2 * half),
    lora_alpha=st.integers(1, 99) | st.floats(0.1, 99),
    lora_dropout=st.floats(0, 1, exclude_max=True),
    target_modules=st.lists(NAMES, min_size=1)
    | st.sets(NAMES, min_size=1)
    | st.sampled_from([r".*\.q", "all-linear", "all-layers"]),
    exclude_modules=st.none() | st.lists(NAMES) | st.just(r"head\..*"),
    modules_to_save=st.none() | st.lists(NAMES),
    trainable_token_indices=st.none() | ROWS | st.dictionaries(NAMES, ROWS.filter(bool)),
    rank_pattern=st.none() | st.dictionaries(PATTERNS, st.integers(1, 8).map(lambda half: 2 * half)),
    alpha_pattern=st.none() | st.dictionaries(PATTERNS, st.floats(0.1, 9)),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    use_rslora=st.booleans(),
    init_lora_weights=st.booleans() | st.sampled_from(["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]),
    enable_lora=st.none() | st.dictionaries(NAMES, st.lists(st.booleans(), min_size=1).filter(any)),
    autocast_adapter_dtype=st.booleans(),
)


BY_NUMBER = st.builds(
    LoRAConfig,
    target_modules=st.lists(NAMES, min_size=1),
    layers_to_transform=st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1),
    layers_pattern=st.none() | NAMES | st.lists(NAMES),
)


@given(config=CONFIGS | BY_NUMBER)
def test_round_trip_through_plain_types(config):
    plain = config.to_dict()
    assert LoRAConfig.from_dict(plain) == config
    assert LoRAConfig.from_dict(json.loads(json.dumps(plain))) == config
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    assert LoRAConfig.from_dict(torch.load(buffer, weights_only=True)) == config


def test_options_that_earlier_versions_had_not_are_left_out_at_their_defaults():
    later = {"target_parameters", "layers_to_transform", "layers_pattern"}
    later |= {"task_type", "trainable_token_indices", "use_dora", "variant", "variant_options"}
    names = {field.name for field in dataclasses.fields(LoRAConfig)}
    assert names - LoRAConfig().to_dict().keys() == later
    options = {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"}
    assert LoRAConfig(**options).to_dict() | {"layers_to_transform": [0], "layers_pattern": ["h"]} == (
        LoRAConfig(**options).to_dict()
    )


def test_a_config_cannot_be_changed_and_keeps_nothing_of_its_callers():
    names, ranks, parts = ["q"], {"q": 4}, [True, False]
    config = LoRAConfig(
        target_modules=names, exclude_modules=names, modules_to_save=names, rank_pattern=ranks, enable_lora={"q": parts}
    )
    names.append("k"), ranks.update(k=2), parts.append(True)
    fresh = LoRAConfig(
        target_modules=["q"],
        exclude_modules=["q"],
        modules_to_save=["q"],
        rank_pattern={"q": 4},
        enable_lora={"q": [True, False]},
    )
    assert config == fresh
    config.to_dict()["rank_pattern"]["q"] = 9
    assert config == fresh
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    with pytest.raises(TypeError):
        LoRAConfig(8)  # keyword-only


def test_order_of_names_in_a_set_and_empty_collections_do_not_matter():
    assert LoRAConfig(target_modules={"v", "q"}) == LoRAConfig(target_modules=["q", "v"])
    assert LoRAConfig(layers_to_transform=[], layers_pattern="") == LoRAConfig()
    assert LoRAConfig(trainable_token_indices=[]) == LoRAConfig(trainable_token_indices={}) == LoRAConfig()
    assert LoRAConfig(trainable_token_indices=[7, 2]).trainable_token_indices == (2, 7)
    assert LoRAConfig(trainable_token_indices={"a": [7, 2]}).to_dict()["trainable_token_indices"] == {"a": [2, 7]}
    assert LoRAConfig(exclude_modules=[], modules_to_save=(), rank_pattern={}, alpha_pattern={}) == LoRAConfig()


def test_differing_names_each_option_that_differs():
    one = LoRAConfig(r=4, bias="all")
    assert one.differing(LoRAConfig(r=4)) == ["bias"]
    assert one.differing(LoRAConfig(lora_alpha=1, bias="all")) == ["r", "lora_alpha"]
    assert one.differing(one) == []
    assert LoRAConfig(target_modules=["v", "q"]).differing(LoRAConfig(target_modules=["q", "v"])) == []


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_numbers_of_numpy_become_pythons_own_so_that_checkpoints_hold_plain_types(kind: Any):
    config = LoRAConfig(
        r=np.int64(4),
        lora_alpha=kind(8),
        lora_dropout=kind(0),
        rank_pattern={"a": np.int32(2)},
        alpha_pattern={"a": kind(3)},
        layers_to_transform=np.int64(1),
        trainable_token_indices={"emb": [np.int64(3), np.int64(1)]},
        target_modules=["a"],
    )
    plain = LoRAConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"a": 2},
        alpha_pattern={"a": 3},
        layers_to_transform=1,
        trainable_token_indices={"emb": [1, 3]},
        target_modules=["a"],
    )
    assert config == plain
    numbers = [config.r, config.lora_alpha, config.lora_dropout, *config.rank_pattern.values()]
    numbers += [*config.alpha_pattern.values(), *config.layers_to_transform, *config.trainable_token_indices["emb"]]
    assert {type(number) for number in numbers} <= {int, float}
    content = io.BytesIO()
    torch.save(config.to_dict(), content)
    content.seek(0)
    assert torch.load(content, weights_only=True) == plain.to_dict()


def test_variant_dora_is_use_dora():
    by_name, by_option = LoRAConfig(variant="dora"), LoRAConfig(use_dora=True)
    assert by_name == by_option
    assert by_name.to_dict() == by_option.to_dict() == LoRAConfig().to_dict() | {"use_dora": True}
    assert by_name.differences(by_option) == []
    assert repr(by_name) == repr(by_option) == "LoRAConfig(use_dora=True)"
    assert LoRACallback(variant="dora").config == by_option
    assert LoRAConfig(variant="lora") == LoRAConfig()


@pytest.mark.parametrize("of", [LoRAConfig, LoRACallback])
@pytest.mark.parametrize(
    ("option", "meant"),
    [("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("target_module", "target_modules")],
)
def test_an_option_as_others_call_it_is_refused_with_the_name_that_it_has_here(of: type, option: str, meant: str):
    with pytest.raises(LoRAError, match=rf"^{of.__name__}: .*'{option}' \(did you mean '{meant}'\?\)"):
        of(**{option: 8})
    with pytest.raises(LoRAError, match=r"'colour'; there are r, ") as caught:
        of(colour=8)
    assert "did you mean" not in str(caught.value)


def test_an_unknown_option_of_a_file_is_refused_with_the_name_that_it_has_here():
    with pytest.raises(LoRAError, match=r"'rank' \(did you mean 'r'\?\)"):
        LoRAConfig.from_dict({"rank": 8})


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ("new: int = 3", r"LoRAConfig.new must be field\(default=..., metadata="),
        ("new: int = field(default=3, metadata=_about('ranks', 'no'))", "LoRAConfig.new has no rule in RULES"),
        ("new: int = field(default=3, metadata=_about('ranks'))", "in_peft"),
    ],
)
def test_an_option_that_is_added_in_part_is_an_error_at_import(field: str, error: str, monkeypatch: pytest.MonkeyPatch):
    source = inspect.getsource(config_file)
    last = "    autocast_adapter_dtype: bool ="
    assert source.count(last) == 1
    module = ModuleType("lightning_lora.config_with_another_option")
    module.__package__ = "lightning_lora"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, vars(module))
    with pytest.raises(TypeError, match=error):
        exec(source.replace(last, f"    {field}\n{last}"), vars(module))
