"""Stacks of experts in PEFT's files, whose layout changed twice.

golden/experts has a folder for each layout, written by that release of peft. An adapter of Net (r=2, lora_alpha=3) was
filled with eighths; expected.safetensors is the change that the same peft then merged into each stack.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    export_adapter,
    inject,
    load_adapter,
    merged_state_dict,
    read_adapter,
    save_adapter,
)
from lightning_lora.command.main import main
from support.covering import covering
from support.files.expected_weights import check_merge_command
from support.models.parameters import fill_factors_
from support.models.peers import TENSORS, edit, refused
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
GOLDEN = Path(__file__).parent / "golden" / "experts"
VERSIONS = ["0.17.1", "0.18.1", "0.19.0", "0.19.1"]


class Stack(nn.Module):
    def __init__(self, shape: tuple[int, ...], is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.experts = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.experts.sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.oblong = Stack((3, 4, 4), False), Stack((3, 4, 6), False)
        self.square_transposed, self.oblong_transposed = Stack((3, 4, 4), True), Stack((3, 4, 6), True)


def expected(version: str, stacks: str = "") -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_file(GOLDEN / version / "expected.safetensors").items() if stacks in n}


def copied(version: str, to: Path, stacks: str = "") -> Path:
    """A golden folder at another place, with those stacks alone whose names have `stacks` in them."""
    shutil.copytree(GOLDEN / version, to)
    save_file({n: t for n, t in load_file(to / TENSORS).items() if stacks in n}, to / TENSORS)
    edit(to, target_parameters=list(expected(version, stacks)))
    return to


def assert_changes(net: nn.Module, version: str, stacks: str = "") -> None:
    found, wanted = merged_state_dict(net), expected(version, stacks)  # the base is zero
    torch.testing.assert_close({name: found[name] for name in wanted}, wanted)


def by_peft(folder: Path, stacks: str) -> dict[str, torch.Tensor]:
    merged = peft.PeftModel.from_pretrained(Net(), folder).merge_and_unload().state_dict()
    return {n: t for n, t in merged.items() if stacks in n}


@pytest.mark.parametrize(("version", "stacks", "in_memory"), covering(VERSIONS, ["square", "oblong"], [False, True]))
def test_a_folder_of_each_peft_changes_the_model_as_that_peft_did(tmp_path, version, stacks, in_memory):
    folder = copied(version, tmp_path / "theirs", stacks)
    load_adapter(net := Net(), read_adapter(folder) if in_memory else folder)
    assert_changes(net, version, stacks)
    save_adapter(net, tmp_path / "ours")  # in today's layout
    torch.testing.assert_close(by_peft(tmp_path / "ours", stacks), expected(version, stacks))
    edit(tmp_path / "ours", peft_version="0.18.1")  # whatever version our own folder names
    load_adapter(again := Net(), tmp_path / "ours")
    assert_changes(again, version, stacks)


@pytest.mark.parametrize(("version", "stacks"), [("0.17.1", ""), ("0.18.1", ""), ("0.19.0", "oblong")])
def test_merge_tells_the_layout_of_stacks_by_the_version_or_of_oblong_ones_by_their_shape(tmp_path, version, stacks):
    save_file(dict(Net().state_dict()), tmp_path / "base.safetensors")
    folder = copied(version, tmp_path / "adapter", stacks)
    files = ["--base", str(tmp_path / "base.safetensors"), "--output", str(tmp_path / "merged.safetensors")]
    assert main(["merge", *files, "--adapter", str(folder)]) == 0
    check_merge_command(*files, "--adapter", str(folder))
    result = load_file(tmp_path / "merged.safetensors")
    for name, change in expected(version, stacks).items():
        torch.testing.assert_close(result[name], change)


def test_merge_refuses_square_stacks_whose_layout_their_module_decides(tmp_path, capsys):
    save_file(dict(Net().state_dict()), tmp_path / "base.safetensors")
    files = ["--base", tmp_path / "base.safetensors", "--output", tmp_path / "merged.safetensors"]
    error = refused(capsys, "merge", *files, "--adapter", GOLDEN / "0.19.0")
    assert "'square.experts' is a stack of square matrices" in error


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0"])
def test_an_older_layout_is_not_written_anew_without_its_model(tmp_path, version):
    named = r"is a stack of experts of peft .*\(load_adapter\)"
    for write in (
        lambda: export_adapter(GOLDEN / version, tmp_path / "a"),
        lambda: save_adapter(read_adapter(GOLDEN / version), tmp_path / "a"),
        lambda: combine([GOLDEN / version, GOLDEN / "0.19.1"], [1, 1]),
    ):
        with pytest.raises(LoRAError, match=named):
            write()
    assert not list(tmp_path.iterdir())


def test_diff_does_not_compare_stacks_of_two_layouts(tmp_path, capsys):
    load_adapter(net := Net(), GOLDEN / "0.18.1")
    save_adapter(net, tmp_path)
    assert main(["diff", str(GOLDEN / "0.18.1"), str(tmp_path), "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert "has another layout in the two" in changes["square.experts"]["problem"]
    assert changes["square_transposed.experts"]["change"] == 0.0


@pytest.mark.parametrize("version", ["0.18.2.dev0@3b1ae61", "0.19.1.dev0"])
def test_a_state_of_peft_between_the_layouts_is_refused(tmp_path, version):
    folder = copied("0.18.1", tmp_path / "a")
    edit(folder, peft_version=version)
    with pytest.raises(LoRAError, match=r"peft changed their layout between .*: .* Set peft_version"):
        load_adapter(Net(), folder)
    edit(folder, peft_version="0.18.1")
    load_adapter(net := Net(), folder)
    assert_changes(net, "0.18.1")


class OneExpert(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.inner = Stack((1, 4, 4), is_transposed)


@pytest.mark.parametrize(("is_transposed", "through_export"), [(False, True), (True, False)])
def test_one_square_expert_of_peft_is_read_as_peft_computes_it(tmp_path, is_transposed, through_export):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts"])
    theirs = peft.get_peft_model(OneExpert(is_transposed), config)  # type: ignore[arg-type]
    fill_factors_(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    merged = theirs.merge_and_unload().state_dict()
    if through_export:
        export_adapter(tmp_path / "a", tmp_path / "b")
    load_adapter(net := OneExpert(is_transposed), tmp_path / ("b" if through_export else "a"))
    torch.testing.assert_close(merged_state_dict(net), dict(merged))


def test_one_transposed_expert_is_refused_when_it_is_saved(tmp_path):
    inject(net := OneExpert(is_transposed=True), LoRAConfig(target_modules=[], target_parameters=["experts"]))
    with pytest.raises(LoRAError, match=r"'inner\.experts' is a stack of one expert with is_transposed"):
        save_adapter(net, tmp_path / "a")
    assert not list(tmp_path.iterdir())
