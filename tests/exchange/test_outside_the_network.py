"""Buffers of a LightningModule outside the adapted network: saved in a file beside PEFT's, and loaded again."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAError, load_adapter, save_adapter, unload
from lightning_lora.command.convert import to_lightning, to_peft
from lightning_lora.command.info import diff, info
from lightning_lora.command.output import MODEL_FOLDER
from support.expected_weights import merge_and_check
from support.models import trace
from support.runs import lora
from support.training import CLASSES, FEATURES, Data, Net, assert_same_tensors, inputs, make_trainer, own_random_stream

OUTSIDE = "outside_network.safetensors"
TARGETS = r"(.*\.)?encoder\.[03]"
SEEN = {f"momentum.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")} | {"criterion.weight"}


class Contrast(Net):
    """A network that is adapted, its momentum copy with BatchNorm, and a loss with weights for each class."""

    def prepare(self) -> None:
        with own_random_stream(1):
            self.network = nn.Module()
            self.network.encoder = nn.Sequential(
                nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)
            )
        self.momentum = copy.deepcopy(self.network.encoder).requires_grad_(False)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network.encoder(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.momentum(batch[0] + 1)
        self.criterion.weight.mul_(1.25)
        return self.criterion(self(batch[0]), batch[1])


class Other(Contrast):
    """Another class around the same network, which calls it by another name and has its own loss."""

    def prepare(self) -> None:
        super().prepare()
        self.net, self.criterion.weight = self.network, torch.full((CLASSES,), 7.0)
        del self.network, self.momentum


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Contrast:
    path = tmp_path_factory.mktemp("tuned")
    model = Contrast()
    trainer = make_trainer(path, lora(target_modules=TARGETS))
    trainer.fit(model, Data())
    trainer.save_checkpoint(path / "a.ckpt")
    model.file = path / "a.ckpt"  # type: ignore[assignment]
    return model


def outside(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name in SEEN}


def network_outputs(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network.eval().encoder(inputs())  # type: ignore[operator]
    return result


def test_folder_brings_tensors_outside_the_network_back_onto_the_same_class(tmp_path, tuned: Contrast):
    save_adapter(tuned, tmp_path)
    assert load_file(tmp_path / OUTSIDE).keys() == SEEN
    load_adapter(loaded := Contrast(), tmp_path)
    assert outside(loaded).keys() == SEEN
    assert_same_tensors(dict(loaded.state_dict()), dict(tuned.state_dict()))
    unload(loaded)
    assert_same_tensors(dict(loaded.state_dict()), dict(Contrast().state_dict()))


def test_bare_network_and_another_class_take_the_adapter_and_not_what_lay_outside(tmp_path, tuned: Contrast):
    save_adapter(tuned, tmp_path)
    expected = network_outputs(tuned.network)
    bare, other = Contrast().network, Other()
    for model, network in ((bare, bare), (other, other.net)):
        load_adapter(model, tmp_path)
        assert torch.equal(network_outputs(network), expected)
    assert other.criterion.weight.tolist() == [7.0] * CLASSES


def test_folder_of_the_bare_network_loads_onto_a_class_with_buffers_outside_it(tmp_path, tuned: Contrast):
    save_adapter(tuned.network, tmp_path)
    assert not (tmp_path / OUTSIDE).exists()
    load_adapter(loaded := Contrast(), tmp_path)
    assert torch.equal(network_outputs(loaded.network), network_outputs(tuned.network))
    assert_same_tensors(outside(loaded), outside(Contrast()))


def test_peft_loads_the_folder_without_a_warning(tmp_path, tuned: Contrast):
    save_adapter(tuned, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(Contrast().network, tmp_path)
    assert not any(
        name.startswith(("criterion", "momentum")) for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    torch.testing.assert_close(network_outputs(model.base_model.model), network_outputs(tuned.network))


def test_saving_again_leaves_no_file_of_an_earlier_model_and_all_else(tmp_path, tuned: Contrast):
    save_adapter(tuned, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save_adapter(tuned.network, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    }


def test_command_reads_converts_and_merges_a_folder_with_tensors_outside_the_network(tmp_path, tuned: Contrast):
    folder, checkpoint = tmp_path / "folder", tuned.file
    save_adapter(tuned, folder)
    assert info(folder)["also_trained"].keys() >= SEEN
    assert not MODEL_FOLDER.holds_content(folder), "merge --overwrite would take it for an earlier result"
    assert all(row["change"] == 0 for row in diff(folder, checkpoint)["changes"].values())
    to_lightning(folder, tmp_path / "imported.ckpt")
    to_peft(tmp_path / "imported.ckpt", tmp_path / "again")
    to_peft(checkpoint, tmp_path / "exported")
    for source in (tmp_path / "imported.ckpt", tmp_path / "exported"):
        load_adapter(loaded := Contrast(), source)
        assert_same_tensors(dict(loaded.state_dict()), dict(tuned.state_dict()))
    torch.save(Contrast().state_dict(), tmp_path / "base.pt")
    torch.save(Contrast().network.state_dict(), tmp_path / "network.pt")
    merge_and_check(tmp_path / "base.pt", folder, tmp_path / "merged.pt")
    merge_and_check(tmp_path / "network.pt", folder, tmp_path / "merged_network.pt")
    assert_same_tensors(outside(merged := plain(Contrast(), tmp_path / "merged.pt")), outside(tuned))
    for network in (merged.network, plain(Contrast().network, tmp_path / "merged_network.pt")):
        torch.testing.assert_close(network_outputs(network), network_outputs(tuned.network))


def plain(model: Any, file: Path) -> Any:
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def test_lone_tensor_file_of_such_a_folder_says_what_it_lacks(tmp_path, tuned: Contrast):
    save_adapter(tuned, tmp_path)
    with pytest.warns(UserWarning, match=f"lie in {OUTSIDE} beside it"):
        load_adapter(loaded := Contrast(), tmp_path / "adapter_model.safetensors")
    assert torch.equal(network_outputs(loaded.network), network_outputs(tuned.network))


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / OUTSIDE)
        change(tensors)
        save_file(tensors, path / OUTSIDE)

    return apply


def cut(path: Path) -> None:
    (path / OUTSIDE).write_bytes((path / OUTSIDE).read_bytes()[:-3])


def described(outside: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        header = json.loads(_metadata(path)["lightning_lora"])
        text = json.dumps(header | {"outside": outside})
        save_file(
            load_file(path / "adapter_model.safetensors"), path / "adapter_model.safetensors", {"lightning_lora": text}
        )

    return apply


def _metadata(path: Path) -> dict[str, str]:
    content = (path / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    result: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return result


DAMAGE = {
    "missing": (f"{OUTSIDE}: is missing", lambda path: (path / OUTSIDE).unlink()),
    "cut": (f"{OUTSIDE}: .*truncated", cut),
    "a tensor gone": ("do not belong together", changed(lambda t: t.pop("criterion.weight"))),
    "a tensor more": ("do not belong together", changed(lambda t: t.update(other=torch.zeros(1)))),
    "another shape": ("must have shape", changed(lambda t: t.update({"criterion.weight": torch.zeros(5)}))),
    "whole numbers": ("must be torch.float32", changed(lambda t: t.update({"criterion.weight": torch.arange(3)}))),
    "no names": ("is damaged", described({"network": "network.", "tensors": 3})),
    "no network": ("is damaged", described({"network": "", "tensors": sorted(SEEN)})),
    "a list": ("is damaged", described([1])),
    "a name inside": ("do not belong together", described({"network": "criterion.", "tensors": sorted(SEEN)})),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_file_of_tensors_outside_the_network_is_refused_by_name(tmp_path, tuned: Contrast, case: str):
    message, damage = DAMAGE[case]
    save_adapter(tuned, tmp_path)
    damage(tmp_path)
    before = trace(fresh := Contrast())
    with pytest.raises(LoRAError, match=message):
        load_adapter(fresh, tmp_path)
    assert trace(fresh) == before
