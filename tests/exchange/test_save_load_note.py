"""The note at the head of exchange/ follows one save and one load: each function is there, and called in that order."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import nn

import lightning_lora.exchange
from lightning_lora import LoRAConfig, inject, load_adapter, save_adapter

NOTE = str(lightning_lora.exchange.__doc__)
PACKAGE = Path(lightning_lora.__file__).parent
FUNCTION = r"((?:\w+/)?\w+)\.(_?\w+)"


def module_of(path: str) -> Any:
    """`take` is a file of exchange/, `model/inject` of another folder."""
    return import_module("lightning_lora." + (path if "/" in path else f"exchange/{path}").replace("/", "."))


def functions_of(title: str) -> list[Any]:
    """The functions of one list of the note, in its order."""
    section = NOTE.split(f"\n{title}")[1].split("\n\n")[1]
    return [getattr(module_of(path), name) for path, name in re.findall(rf"^ +{FUNCTION}(?: |$)", section, re.M)]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def called(call: Callable[[], object]) -> list[Any]:
    """The code of each function of the package that a call runs, in the order of the first calls."""
    codes: dict[Any, None] = {}

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            codes.setdefault(frame.f_code)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(codes)


def code_of(function: Any) -> Any:
    return getattr(function, "__wrapped__", function).__code__


@pytest.mark.parametrize("title", ["save_adapter(model, path)", "load_adapter(model, path)"])
def test_a_save_and_a_load_call_the_functions_of_the_note_in_its_order(title: str, tmp_path: Path):
    inject(model := net(), LoRAConfig(r=2, init_lora_weights=False))
    codes = called(lambda: save_adapter(model, tmp_path))
    if title.startswith("load"):
        target = net()
        target.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name})
        codes = called(lambda: load_adapter(target, tmp_path))
    functions = functions_of(title)
    assert len(functions) > 10
    assert [code_of(each) for each in functions if code_of(each) not in codes] == []
    order = [codes.index(code_of(each)) for each in functions]
    assert order == sorted(order)


def test_every_file_and_function_that_the_note_names_is_there():
    named = re.findall(rf"\b{FUNCTION}\b", NOTE)
    for path, name in named:
        if name == "py":
            assert any((PACKAGE / folder / f"{path}.py").is_file() for folder in ("", "exchange")), path
        elif name != "json":
            assert hasattr(module_of(path), name), f"{path}.{name}"
    assert len(named) > 30
