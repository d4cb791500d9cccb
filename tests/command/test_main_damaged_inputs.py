"""Adapters and bases that were cut or damaged, or hold too much: the command refuses them by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lightning_lora.command.main import main
from support.models.networks import TENSORS, WIDTH, merging, small, write_small_adapter
from support.models.peers import call, refused

Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_small_adapter(tmp_path)


def spoil(folder: Path, change: Change, keep_header: bool = True) -> None:
    with safe_open(folder / TENSORS, "pt") as file:
        header = file.metadata()
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, header if keep_header else None)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


def test_merge_into_a_base_with_more_than_the_network_asks_for_nothing_outside_it(tmp_path: Path, capsys: Any):
    """Neither a module outside that has the name of one that is trained whole, nor biases there, nor masks."""
    other = nn.ModuleDict({"two": nn.Linear(1, 1)})
    net = nn.ModuleDict({"network": Biased(), "other": other, "two": nn.Linear(1, 1)})
    masks = {"network.one.mask_bias": torch.ones(1, 1, 2, 2), "network.two.ids": torch.ones(2, dtype=torch.int64)}
    torch.save(net.state_dict() | masks, tmp_path / "base.pt")
    inject(net["network"], LoRAConfig(r=2, target_modules=["one"], modules_to_save=["two"], bias="all"))
    save_adapter(net["network"], tmp_path / "adapter")
    call(capsys, *merging(tmp_path, tmp_path / "adapter"))


def test_a_folder_of_peft_with_a_b_and_no_a_is_refused(tmp_path: Path, capsys: Any, adapter: Path):
    spoil(adapter, lambda tensors: tensors.pop("base_model.model.two.lora_A.weight"), keep_header=False)
    with pytest.raises(LoRAError, match="two"):
        load_adapter(small(), adapter)
    for args in (merging(tmp_path, adapter), ["export", adapter, tmp_path / "copy"]):
        assert "two.lora_" in refused(capsys, *args)


@pytest.mark.parametrize("named", ["base_model.model.four.weight", "four.bias"])
def test_a_whole_tensor_that_no_option_names_and_the_base_has_not_is_refused(
    tmp_path: Path, capsys: Any, adapter: Path, named: str
):
    """It may have been trained. load_adapter refuses it too."""
    spoil(adapter, lambda tensors: tensors.update({named: torch.ones(WIDTH)}), keep_header=False)
    said = refused(capsys, *merging(tmp_path, adapter))
    assert f"the adapter comes with {named.removeprefix('base_model.model.')!r} whole, and the base has no such" in said
    with pytest.raises(LoRAError, match=r"'four\.\w+' has no place in the model"):
        load_adapter(small(), adapter)


def test_a_file_of_another_form_is_told_so_and_no_advice_of_torch_is_passed_on(tmp_path: Path, capsys: Any):
    (tmp_path / "some.py").write_text('import torch\n{"seed": [0]}\n' * 3)
    said = refused(capsys, "info", tmp_path / "some.py")
    assert "is no file of a known form" in said
    assert "weights_only" not in said


def test_a_whole_tensor_outside_of_the_base_is_warned_of_in_memory_and_refused_on_disk(
    tmp_path: Path, adapter: Path, capsys: Any
):
    """A result on disk lacks it, and nothing says so later."""

    def put_into_net(tensors: dict[str, Any]) -> None:
        moved = {name.replace(".model.", ".model.net."): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(moved, **{"base_model.model.other.weight": torch.ones(1, WIDTH)})

    spoil(adapter, put_into_net, keep_header=False)
    with pytest.warns(UserWarning, match="1 of the adapter's tensors lie outside .*, first 'other.weight'"):
        load_adapter(small(), adapter)
    verb, *arguments = merging(tmp_path, adapter)
    said = refused(capsys, verb, *arguments)
    assert "1 of the adapter's tensors lie outside" in said
    for named in ("'other.weight'", "--strict-base=false", "save_merged"):
        assert named in said
    with pytest.warns(UserWarning, match="1 of the adapter's tensors lie outside .*, first 'other.weight'"):
        assert main([verb, *map(str, arguments), "--strict-base=false"]) == 0


@pytest.mark.parametrize("shape", [(WIDTH, 2, 3), (0, 2, 2)])
def test_info_and_diff_of_a_factor_with_too_many_dimensions_are_refused(
    tmp_path: Path, capsys: Any, adapter: Path, shape: tuple[int, ...]
):
    """Not with the error of whatever they compute with it."""
    spoil(adapter, lambda tensors: tensors.update({"base_model.model.one.lora_B.weight": torch.zeros(shape)}))
    assert "one" in refused(capsys, "info", adapter)
    assert "one" in refused(capsys, "diff", adapter, adapter)


@pytest.mark.parametrize("rows_a", [1, 6])
def test_info_of_factors_that_do_not_fit_each_other_is_refused(tmp_path: Path, capsys: Any, rows_a: int):
    """Without options, six rows of A and two columns of B may be three parts, but not of four outputs."""
    torch.save({"0.lora_A": torch.ones(rows_a, 4), "0.lora_B": torch.ones(4, 2)}, tmp_path / "bare.pt")
    said = refused(capsys, "info", tmp_path / "bare.pt")
    assert "'0'" in said
    assert "do not share a rank" in said or "do not fit each other" in said
