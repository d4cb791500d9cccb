"""read_adapter and take_adapter: adapters as values, which every function takes that takes a path."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    export_adapter,
    inject,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.adapter.adapter import Adapter
from support.models.networks import base_zoo, bits, state_bits, train, trained_zoo, two_layers
from support.runs.notices import TORCH_NOTICES

pytestmark = [*TORCH_NOTICES, pytest.mark.core]


def held_bits(adapter: Adapter) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in adapter.tensors.items()}


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


def test_a_taken_adapter_is_written_as_the_model_s_own(tmp_path: Path):
    model = trained_zoo()
    merge(model)
    save_adapter(model, tmp_path / "model")
    save_adapter(take_adapter(model), tmp_path / "taken")
    for file in sorted(path.name for path in (tmp_path / "model").iterdir()):
        assert (tmp_path / "taken" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_an_adapter_in_memory_does_not_change_with_its_file(tmp_path: Path):
    save_adapter(two_layers(), tmp_path)
    adapter, file = read_adapter(tmp_path), tmp_path / "adapter_model.safetensors"
    held, size = held_bits(adapter), file.stat().st_size
    with open(file, "r+b") as written:  # as some programs save: in place
        written.seek(size - 100)
        written.write(b"\0" * 100)
    assert held_bits(adapter) == held


# --- checks ---


def test_what_is_no_adapter_is_refused_by_the_function_s_name():
    for source in (3, None, [1]):
        with pytest.raises(LoRAError, match=r"^read_adapter: expected a path, a state dict or an adapter, found \w+"):
            read_adapter(source)
    with pytest.raises(LoRAError, match=r"^read_adapter: the source holds no lora_A"):
        read_adapter({"epoch": 3})
    with pytest.raises(LoRAError, match=r"^take_adapter: Linear was not injected"):
        take_adapter(nn.Linear(2, 2))


def test_a_model_as_a_source_is_refused_with_the_call_that_takes_its_adapter(tmp_path: Path):
    plain = nn.Sequential(nn.Linear(2, 2))
    inject(model := copy.deepcopy(plain), LoRAConfig(r=1))
    for verb, call in {
        "read_adapter": read_adapter,
        "load_adapter": lambda source: load_adapter(plain, source),
        "export_adapter": lambda source: export_adapter(source, tmp_path / "folder"),
        "combine": lambda source: combine([source], [1]),
    }.items():
        with pytest.raises(LoRAError, match=f"^{verb}.* found Sequential.* call take_adapter"):
            call(model)
        call(take_adapter(model))  # as the error says


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
