"""The page on the state of an adapted model, at the head of model/, says what there is and what copies keep."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from torch import nn

import lightning_lora.model
from lightning_lora import LoRAConfig, inject
from lightning_lora.model.facts import Fact, ModuleFacts
from lightning_lora.model.injection import Injection, Mark
from lightning_lora.nn.adapted_weights import LayerState
from lightning_lora.nn.exact_merge import Undo

PAGE = str(lightning_lora.model.__doc__)


def table(of: type) -> dict[str, str]:
    """What the page says of the fields of a class: kept or new in a copy."""
    section = re.split(rf"^{of.__name__}, in ", PAGE, flags=re.M)[1]
    rows = re.search(r"(?:^    \w+ +(?:kept|new) .*\n)+", section, re.M)
    assert rows is not None
    return dict(line.split()[:2] for line in rows.group().splitlines())


def made() -> dict[type, Any]:
    inject(model := nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    facts: Any = vars(model[0])["lora_facts"]
    injection: Any = model.lora_injection
    return {
        Injection: injection,
        LayerState: model[0].lora,
        ModuleFacts: facts,
        Fact: facts.tensors["weight"],
        Undo: Undo(),
    }


@pytest.mark.parametrize("of", [Injection, LayerState, ModuleFacts, Fact, Undo], ids=lambda of: of.__name__)
def test_the_page_has_each_field_and_what_a_copy_keeps_of_it(of: type):
    each, said = made()[of], table(of)
    assert [*said] == [field.name for field in fields(of)]
    for name in said:
        if name != "spec":  # which LayerState reads
            setattr(each, name, torch.zeros(()))
    state = each.__getstate__() if "__getstate__" in vars(of) else vars(each)
    kept = {name for name in said if state.get(name, None) is getattr(each, name)}
    assert {name: "kept" if name in kept else "new" for name in said} == said


def test_the_page_has_each_mark():
    marks = re.search(r"Its marks: ([^.]*)\.", PAGE)
    assert marks is not None
    assert re.split(r",\s+", marks[1]) == [*get_args(Mark)]
