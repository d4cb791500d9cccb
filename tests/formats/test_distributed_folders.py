"""Distributed checkpoint folders at every door that takes an adapter: as the file of the same content."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    combine,
    inject,
    load_adapter,
    load_from_checkpoint,
    read_adapter,
    save_adapter,
)
from lightning_lora.command.convert import to_lightning, to_peft
from lightning_lora.command.info import diff, info
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.files.weights import open_weights
from lightning_lora.formats.forms import form_of
from support.distributed_folders import write_as_lightning, write_sharded
from support.models import base_zoo, checkpoint, state_bits, trained_zoo
from support.runs import lora, trained
from support.training import Data, Net, assert_same_tensors, make_trainer

KINDS = ["adapter", "merged", "full"]


@pytest.fixture(params=KINDS)
def forms(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """A kind of checkpoint, a file of it, and a distributed folder with the same content."""
    content = checkpoint(trained_zoo(), request.param)
    torch.save(content, tmp_path / "file.ckpt")
    return request.param, tmp_path / "file.ckpt", write_as_lightning(tmp_path / "folder.ckpt", content)


def test_folder_loads_as_the_file(forms: tuple[str, Path, Path]):
    _, file, folder = forms
    found, expected = base_zoo(), base_zoo()
    assert load_adapter(found, folder) == load_adapter(expected, file)
    assert state_bits(found) == state_bits(expected)
    swapped = trained_zoo()
    load_adapter(swapped, folder)
    assert state_bits(swapped) == state_bits(expected)


def test_folder_is_read_as_the_file(forms: tuple[str, Path, Path], tmp_path: Path):
    kind, file, folder = forms
    found, expected = read_adapter(folder), read_adapter(str(file))
    assert_same_tensors(found.tensors, expected.tensors)
    assert (found.config, found.scalings, found.kinds) == (expected.config, expected.scalings, expected.kinds)
    assert found.fingerprint == expected.fingerprint
    shown, of_file = info(folder), info(file)
    assert shown.pop("kind") == f"distributed {of_file['kind']}"
    assert of_file.pop("kind") == f"Lightning checkpoint of kind {kind!r}"
    assert shown.pop("path") == str(folder) != of_file.pop("path")
    assert shown == of_file
    assert not any(row["change"] for row in diff(folder, file)["changes"].values())


def linear_pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base and an adapter, as a file and as a distributed folder."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    content = checkpoint(model, "adapter")
    torch.save(content, tmp_path / "file.ckpt")
    return tmp_path / "base.safetensors", tmp_path / "file.ckpt", write_as_lightning(tmp_path / "sharded", content)


def assert_same_files(first: Path, second: Path) -> None:
    files = sorted(file.name for file in first.iterdir()) if first.is_dir() else [""]
    assert len(files) > 0
    for name in files:
        assert (first / name if name else first).read_bytes() == (second / name if name else second).read_bytes()


VERBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "merge": lambda source, base, output: merge_on_disk(base, source, output / "merged.safetensors", check=True),
    "export": lambda source, base, output: to_peft(source, output / "peft"),
    "save_adapter": lambda source, base, output: save_adapter(read_adapter(source), output / "peft"),
    "combine": lambda source, base, output: combine([source, source], [1, 2], output=output / "peft"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verb_takes_the_folder_as_the_file(tmp_path: Path, verb: str):
    base, file, folder = linear_pair(tmp_path)
    outputs = []
    for source in (file, folder):
        outputs.append(tmp_path / f"of_{source.name}")
        outputs[-1].mkdir()
        VERBS[verb](source, base, outputs[-1])
    (first,), (second,) = (list(output.iterdir()) for output in outputs)
    assert_same_files(first, second)


def test_import_makes_one_file_of_a_folder(tmp_path: Path):
    _, file, folder = linear_pair(tmp_path)
    to_lightning(folder, tmp_path / "imported.ckpt")
    assert_same_tensors(read_adapter(tmp_path / "imported.ckpt").tensors, read_adapter(file).tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_module_is_built_from_a_folder_as_from_the_file(tmp_path: Path, kind: str):
    trained(tmp_path, model := Net(width=9), lora(save=kind))
    model.trainer.save_checkpoint(file := tmp_path / "file.ckpt")
    content = torch.load(file, weights_only=True)
    folder = write_as_lightning(tmp_path / "folder.ckpt", content)
    found, expected = load_from_checkpoint(Net, folder), load_from_checkpoint(Net, file)
    assert_same_tensors(dict(found.state_dict()), dict(expected.state_dict()))
    assert found.hparams == expected.hparams


def test_folder_of_fsdp1_is_read(tmp_path: Path):
    """Lightning's FSDPStrategy calls the state dict "model"."""
    content = checkpoint(trained_zoo(), "full")
    folder = write_as_lightning(tmp_path / "folder", content, key="model")
    load_adapter(model := base_zoo(), folder)
    assert state_bits(model) == state_bits(trained_zoo())


def test_state_dicts_that_were_saved_by_hand_are_read(tmp_path: Path):
    """Fabric's entries, with optimizers beside them, and torch.distributed.checkpoint by itself."""
    model = trained_zoo()
    state = adapter_state_dict(model)
    moments = {name: {"exp_avg": tensor} for name, tensor in state.items()}
    entries = {"net": model.state_dict(), "optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}}
    folders = [write_sharded(tmp_path / "plain", state), write_sharded(tmp_path / "entries", entries)]
    torch.save({"epoch": 3}, folders[1] / "meta.pt")
    for folder in folders:
        load_adapter(found := trained_zoo(init_lora_weights=False), folder)
        assert_same_tensors(adapter_state_dict(found), state)
        assert info(folder)["kind"] == "state dict with an adapter and no options, as loralib writes it"
    with pytest.raises(LoRAError, match="no options"):
        load_adapter(base_zoo(), folders[0])


def test_weights_in_a_folder_are_shown_and_no_base(tmp_path: Path):
    base, file, _ = linear_pair(tmp_path)
    folder = write_as_lightning(tmp_path / "weights", {"epoch": 1, "state_dict": load_file(base)})
    shown = info(folder)
    assert (shown["kind"], shown["form"], shown["files"], shown["tensors"]) == ("weights", "distributed", 2, 4)
    assert (shown["parameters"], shown["bytes"], shown["dtypes"]) == (53, 212, {"float32": 4})
    for verb in (lambda: merge_on_disk(folder, file, tmp_path / "out"), lambda: open_weights(folder)):
        with pytest.raises(LoRAError, match=r"weights: is a distributed checkpoint.*consolidate_checkpoint"):
            verb()
    with pytest.raises(LoRAError, match="the source holds no lora_A"):
        load_adapter(base_zoo(), folder)


def test_form_of_a_folder_is_told_in_one_place(tmp_path: Path):
    _, file, folder = linear_pair(tmp_path)
    save_adapter(read_adapter(file), tmp_path / "peft")
    (tmp_path / "other").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "meta.pt").touch()
    paths = [file, folder, tmp_path / "peft", tmp_path / "other", tmp_path / "cut", tmp_path / "base.safetensors"]
    assert [form_of(path) for path in paths] == [
        "torch file", "distributed folder", "PEFT folder", "folder", "distributed folder", "safetensors file"
    ]  # fmt: skip


# --- damage ---

DOORS: dict[str, Callable[[Path], Any]] = {
    "load_adapter": lambda path: load_adapter(base_zoo(), path),
    "read_adapter": read_adapter,
    "load_from_checkpoint": lambda path: load_from_checkpoint(Net, path),
    "info": info,
    "combine": lambda path: combine([path, path], [1, 1]),
    "export": lambda path: to_peft(path, path.parent / "out"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("missing", ["meta.pt", ".metadata", "__0_0.distcp"])
def test_folder_that_is_not_whole_is_refused_at_each_door(tmp_path: Path, missing: str, door: str):
    folder = write_as_lightning(tmp_path / "folder", checkpoint(trained_zoo(), "adapter"))
    (folder / missing).unlink()
    with pytest.raises(LoRAError, match=f"{missing}: is missing, "):
        DOORS[door](folder)


def test_model_stays_as_it_was_when_a_shard_is_damaged(tmp_path: Path):
    folder = write_as_lightning(tmp_path / "folder", checkpoint(trained_zoo(r=3), "adapter"))
    shutil.copy(min(folder.glob("*.distcp")), max(folder.glob("*.distcp")))
    model = trained_zoo()
    before = state_bits(model)
    with pytest.raises(LoRAError, match=r"\.distcp: "):
        load_adapter(model, folder)
    assert state_bits(model) == before


def test_folder_of_another_kind_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "other").mkdir()
    with pytest.raises(LoRAError, match="other: neither a checkpoint file nor a folder with a distributed checkpoint"):
        load_from_checkpoint(Net, tmp_path / "other")


def test_objects_in_the_state_are_refused_and_beside_it_passed_over(tmp_path: Path):
    content = checkpoint(trained_zoo(), "adapter")
    folder = write_as_lightning(tmp_path / "a", {**content, "callbacks": {"x": lora().config.__class__}})
    assert load_adapter(base_zoo(), folder)
    folder = write_as_lightning(tmp_path / "b", {**content, "state_dict": {**content["state_dict"], "x": LoRAConfig}})
    with pytest.raises(LoRAError, match="holds objects other than plain types and tensors"):
        load_adapter(base_zoo(), folder)


class Scaled(Net):
    """Has a hyper-parameter that is no plain type."""

    def __init__(self, width: int = 9, scale: Fraction = Fraction(1, 3)) -> None:
        super().__init__(width)


def test_object_in_hyper_parameters_is_unpickled_only_where_that_is_said(tmp_path: Path):
    trained(tmp_path, model := Scaled(scale=Fraction(2, 5)), lora())
    model.trainer.save_checkpoint(file := tmp_path / "file.ckpt")
    folder = write_as_lightning(tmp_path / "folder", torch.load(file, weights_only=False))
    load_adapter(found := Net(9), folder)
    assert_same_tensors(dict(found.state_dict()), dict(model.state_dict()))
    with pytest.raises(LoRAError, match=r"checkpoint\['hyper_parameters'\]\['scale'\] is of fractions.Fraction"):
        load_from_checkpoint(Scaled, folder)
    assert load_from_checkpoint(Scaled, folder, weights_only=False).hparams["scale"] == Fraction(2, 5)
    assert load_from_checkpoint(Scaled, folder, scale=Fraction(1, 7)).hparams["scale"] == Fraction(1, 7)


def test_trainer_on_one_device_takes_a_folder_without_objects_in_its_own_state(tmp_path: Path):
    trained(tmp_path, model := Scaled(scale=Fraction(2, 5)), lora())
    model.trainer.save_checkpoint(file := tmp_path / "file.ckpt")
    content = torch.load(file, weights_only=False)
    del content["optimizer_states"]  # by positions: a sharding strategy saves them by names
    folder = write_as_lightning(tmp_path / "folder", content)
    make_trainer(tmp_path, lora()).validate(found := Net(9), Data(8), ckpt_path=folder, verbose=False)
    assert_same_tensors(dict(found.state_dict()), dict(model.state_dict()))
    folder = write_as_lightning(tmp_path / "other", {**content, "callbacks": {"Mine": {"best": Fraction(1, 2)}}})
    with pytest.raises(LoRAError, match=r"checkpoint\['callbacks'\]\['Mine'\]\['best'\] is of fractions.Fraction"):
        make_trainer(tmp_path, lora()).validate(Net(9), Data(8), ckpt_path=folder)
