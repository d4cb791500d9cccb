"""read_adapter and take_adapter: adapters as values, which every function takes that takes a path."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    export_adapter,
    inject,
    load_adapter,
    merge,
    plot_adapter,
    read_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.adapter.adapter import Adapter
from support.models import base_zoo, bits, checkpoint, state_bits, train, trained_zoo
from support.notices import TORCH_NOTICES

pytestmark = TORCH_NOTICES


def net(seed: int = 2, **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inject(model, LoRAConfig(**{"r": 2, "init_lora_weights": False} | options), seed=seed)
    return model


def held_bits(adapter: Adapter) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in adapter.tensors.items()}


def test_a_dictionary_of_adapters_is_several_named_ones_and_each_is_swapped_in(tmp_path: Path):
    models = {"folder": net(2), "checkpoint": net(3, r=4), "taken": net(4), "state": net(5)}
    save_adapter(models["folder"], tmp_path / "folder")
    named = {
        "folder": read_adapter(tmp_path / "folder"),
        "checkpoint": read_adapter(checkpoint(models["checkpoint"], "adapter")),
        "taken": take_adapter(models["taken"]),
        "state": read_adapter(checkpoint(models["state"], "bare")),
    }
    model = net(9)
    factor = model[0].lora_A
    for name in ("taken", "folder", "state", "checkpoint", "folder", "taken"):
        assert load_adapter(model, named[name]) == ["0", "2"]
        assert state_bits(model) == state_bits(models[name])
        assert model[0].lora_A is factor


def test_a_plain_model_takes_an_adapter_in_memory_and_trains_apart_from_it():
    trained = trained_zoo()
    adapter = take_adapter(trained)
    held, model = held_bits(adapter), base_zoo()
    load_adapter(model, adapter)
    assert state_bits(model) == state_bits(trained)
    train(model)
    train(trained)
    assert held_bits(adapter) == held
    assert held.keys() >= {"head.weight", "body.1.running_var", "embed.lora_A"}
    load_adapter(trained, adapter)
    load_adapter(again := base_zoo(), adapter)
    assert state_bits(trained) == state_bits(again)


@pytest.mark.parametrize("merged", [False, True])
def test_a_taken_adapter_is_written_as_the_model_s_own(tmp_path: Path, merged: bool):
    model = trained_zoo()
    merge(model) if merged else None
    save_adapter(model, tmp_path / "model")
    save_adapter(take_adapter(model), tmp_path / "taken")
    for file in sorted(path.name for path in (tmp_path / "model").iterdir()):
        assert (tmp_path / "taken" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_an_adapter_in_memory_is_combined_as_its_file(tmp_path: Path):
    for name, model in (("a", net(2)), ("b", net(3, r=4))):
        save_adapter(model, tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    expected, found = (combine(each, [0.5, 2]).tensors for each in (paths, [*map(read_adapter, paths)]))
    assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in expected.items()}


def test_an_adapter_in_memory_is_drawn():
    pytest.importorskip("matplotlib")
    figures = plot_adapter(take_adapter(net()))
    assert set(figures) == {"norms", "spectra"}


def test_an_adapter_in_memory_does_not_change_with_its_file(tmp_path: Path):
    save_adapter(net(), tmp_path)
    adapter, file = read_adapter(tmp_path), tmp_path / "adapter_model.safetensors"
    held, size = held_bits(adapter), file.stat().st_size
    with open(file, "r+b") as written:  # as some programs save: in place
        written.seek(size - 100)
        written.write(b"\0" * 100)
    assert held_bits(adapter) == held


# --- checks ---


@pytest.mark.parametrize("source", [3, None, [1]])
def test_what_is_no_adapter_is_refused_by_the_function_s_name(source: Any):
    with pytest.raises(LoRAError, match=r"^read_adapter: expected a path, a state dict or an adapter, found \w+\.$"):
        read_adapter(source)


@pytest.mark.parametrize("verb", ["read_adapter", "load_adapter", "export_adapter", "combine: adapters[0]"])
def test_a_model_as_a_source_is_refused_with_the_call_that_takes_its_adapter(verb: str, tmp_path: Path):
    plain = nn.Sequential(nn.Linear(2, 2))
    inject(model := copy.deepcopy(plain), LoRAConfig(r=1))
    calls: dict[str, Callable[[Any], Any]] = {
        "read_adapter": read_adapter,
        "load_adapter": lambda source: load_adapter(plain, source),
        "export_adapter": lambda source: export_adapter(source, tmp_path / "folder"),
        "combine: adapters[0]": lambda source: combine([source], [1]),
    }
    expected = "expected a path, a state dict or an adapter, found Sequential. Of a model, call take_adapter first"
    with pytest.raises(LoRAError, match=f"^{re.escape(f'{verb}: {expected}')}"):
        calls[verb](model)
    calls[verb](take_adapter(model))  # as the error says


def test_a_source_without_an_adapter_is_refused_by_the_function_s_name():
    with pytest.raises(LoRAError, match=r"^read_adapter: the source holds no lora_A"):
        read_adapter({"epoch": 3})
    with pytest.raises(LoRAError, match=r"^take_adapter: Linear was not injected"):
        take_adapter(nn.Linear(2, 2))


class Counting(nn.Module):
    """Has extra state, which a list is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 3), [0]

    def get_extra_state(self) -> list[int]:
        return self.seen

    def set_extra_state(self, state: list[int]) -> None:
        self.seen = state


def test_extra_state_is_copied_both_ways():
    model = Counting()
    inject(model, LoRAConfig(r=1, target_modules=["layer"]))
    adapter = take_adapter(model)
    model.seen.append(1)
    load_adapter(model, adapter)
    assert model.seen == [0]
    model.seen.append(2)
    assert adapter.tensors["_extra_state"] == [0]
