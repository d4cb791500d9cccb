"""The table of layer kinds: a module is of one kind, and the lists made of the table are what they were by hand."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
from torch import nn

from lightning_lora.nn import layer_kinds, low_rank
from lightning_lora.nn.layer_kinds import ADAPTABLE, LAYER_KINDS, MORE_MODULES, layer_class
from lightning_lora.nn.lora_layer import LAYER_CLASSES, LoRALayer
from support.models.layers import CASES


@pytest.mark.parametrize("name", [name for name in CASES if "dora" not in name])
def test_a_module_is_of_one_kind_so_that_the_order_of_the_table_does_not_matter(name: str):
    module = CASES[name].build()
    (found,) = (kind.adapting for kind in LAYER_KINDS if kind.adapting.adapts(module))
    assert layer_class(module) is found


def test_lists_that_are_made_of_the_table():
    assert ADAPTABLE == "nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d/2d/3d and nn.MultiheadAttention"
    assert (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention) == MORE_MODULES
    assert [kind.adapting for kind in LAYER_KINDS] == LAYER_CLASSES[: len(LAYER_KINDS)]


@pytest.mark.parametrize(("kind", "error"), [("Linear", "Other has no row in LAYER_KINDS"), ("Bilinear", "TABLE")])
def test_a_class_or_a_kind_without_a_row_is_an_error_at_import(kind: str, error: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_lora.nn.lora_layer.LAYER_CLASSES", classes := list(LAYER_CLASSES))
    other = type("Other", (LoRALayer,), {"KIND": kind, "MODULES": (nn.Bilinear,)})
    assert classes[-1] is other
    source = inspect.getsource(layer_kinds)
    if kind not in low_rank.KINDS:
        source = source.replace(
            "_in_table = ", "LAYER_KINDS += (LayerKind(LAYER_CLASSES[-1], '', 'names'),)\n_in_table = "
        )
    module = ModuleType("lightning_lora.nn.layer_kinds_again")
    module.__package__ = "lightning_lora.nn"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(TypeError, match=error):
        exec(source, vars(module))
