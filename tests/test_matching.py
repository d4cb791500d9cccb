"""Entries of options that name nothing: one error with near misses, or a warning where others fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject
from support.models.networks import Zoo, zoo_config


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"target_modules": ["bodi.3"]}, "target_modules: 'bodi.3' names no layer to adapt; did you mean"),
        ({"target_modules": r"body\.7"}, r"target_modules: 'body\\.7' names no layer to adapt"),
        ({"exclude_modules": ["convv"]}, "exclude_modules: 'convv' names no layer to adapt; did you mean 'conv'"),
        ({"exclude_modules": ["body"]}, "exclude_modules: 'body' names no layer to adapt"),  # a container
        (  # PEFT writes the names of the task's heads into its own modules_to_save
            {"modules_to_save": ["classifier", "haed"], "task_type": "SEQ_CLS"},
            "modules_to_save: 'haed' names no module; did you mean 'head'",
        ),
        ({"rank_pattern": {"head": 4}}, "rank_pattern: 'head' names no adapted layer"),  # saved, not adapted
        ({"alpha_pattern": {"onv": 4}}, "alpha_pattern: 'onv' names no adapted layer; did you mean 'conv'"),
        ({"enable_lora": {"body.00": [True]}}, "enable_lora: 'body.00' names no layer to adapt; did you mean 'body.0'"),
    ],
)
def test_an_entry_that_names_nothing_is_an_error_with_near_misses(options, complaint):
    with pytest.raises(LoRAError, match=r"^inject: Zoo: ") as caught:
        inject(Zoo(), zoo_config(**options))
    assert complaint in str(caught.value)


def test_a_slip_among_entries_that_fit_gets_its_near_miss_and_an_entry_for_another_model_none():
    options = {"target_modules": ["conv", "bdy.0", "gate_proj"], "rank_pattern": {"conv": 2, "bdoy.0": 3}}
    with pytest.warns(UserWarning, match="are ignored") as caught:
        inject(Zoo(), zoo_config(**options))
    said = str(caught[0].message)
    assert "'bdy.0' (did you mean 'body.0'?), 'gate_proj'; rank_pattern" in said
    assert said.count("did you mean") == 1  # body.0 is not adapted then, and so no pattern can mean it


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({"target_modules": ["conv", "gate_proj", "up_proj"]}, "target_modules: 'gate_proj', 'up_proj'"),
        ({"exclude_modules": ["body.0", "vision_tower"]}, "exclude_modules: 'vision_tower'"),
        ({"enable_lora": {"body.0": [True], "qkv": [True]}}, "enable_lora: 'qkv'"),
        (
            {"target_modules": ["conv"], "trainable_token_indices": {"embed": [1], "wte": [1]}},
            "trainable_token_indices: 'wte'",
        ),
        (
            {"rank_pattern": {"conv": 2, "q": 2}, "alpha_pattern": {"v": 1, "conv": 2}},
            "rank_pattern: 'q'; alpha_pattern: 'v'",
        ),
    ],
)
def test_entries_beside_others_that_fit_are_passed_over_with_one_warning_that_lists_them(options, unused):
    def plain() -> list[str]:
        kept: dict[str, Any] = {}
        for option, entries in options.items():
            fitting = [entry for entry in entries if f"'{entry}'" not in unused]
            kept[option] = {entry: entries[entry] for entry in fitting} if isinstance(entries, dict) else fitting
        return inject(Zoo(), zoo_config(**kept))

    with pytest.warns(UserWarning, match="are ignored") as caught:
        names = inject(Zoo(), zoo_config(**options))
    assert [str(each.message) for each in caught] == [
        f"lightning_lora: entries that name nothing are ignored: {unused}"
    ]
    assert caught[0].filename == __file__
    assert names == plain()


def test_a_string_that_names_nothing_is_told_to_be_an_expression():
    rule = "a string is a regular expression for the whole name, a list holds names or their endings"
    layers = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([layers])})
    with pytest.raises(LoRAError) as caught:
        inject(model, LoRAConfig(target_modules="query"))
    assert f"'query' names no layer to adapt; {rule}; did you mean ['query']" in str(caught.value)
    with pytest.raises(LoRAError, match=rf"'.*qurey' names no layer to adapt; {rule}; did you mean .*'query'"):
        inject(model, LoRAConfig(target_modules=".*qurey"))
    assert inject(model, LoRAConfig(target_modules=["query"])) == ["layers.0.query"]  # as the hint says


def test_all_entries_that_name_nothing_come_in_one_error():
    options = {
        "target_modules": ["t1"],
        "exclude_modules": ["x1"],
        "modules_to_save": ["s1"],
        "rank_pattern": {"r1": 2},
        "alpha_pattern": {"p1": 2},
        "enable_lora": {"e1": [True]},
    }
    with pytest.raises(LoRAError) as caught:
        inject(Zoo(), zoo_config(**options))
    assert re.findall(r"(\w+): '(\w1)'", str(caught.value)) == [
        ("target_modules", "t1"),
        ("exclude_modules", "x1"),
        ("modules_to_save", "s1"),
        ("enable_lora", "e1"),
        ("rank_pattern", "r1"),
        ("alpha_pattern", "p1"),
    ]


def test_target_without_near_misses_is_refused_with_what_there_is():
    there_are = r"there are 'embed', 'conv', 'body\.0', 'body\.3', 'head'"
    with pytest.raises(LoRAError, match=rf"'zzzzz' names no layer to adapt; {there_are}"):
        inject(Zoo(), zoo_config(target_modules=["zzzzz"]))
    with pytest.raises(LoRAError, match="leaves no layer to adapt"):
        inject(nn.Sequential(nn.ReLU()), LoRAConfig())


def test_the_layers_that_a_pattern_does_not_name_are_told_in_order():
    """A set of names has another order in each process, and on each rank."""
    with pytest.raises(LoRAError, match=r"'zzzzz' names no adapted layer; there are 'body\.0', 'body\.3', 'conv'"):
        inject(Zoo(), zoo_config(rank_pattern={"zzzzz": 2}))
