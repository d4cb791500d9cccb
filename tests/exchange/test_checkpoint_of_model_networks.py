"""Merged checkpoints of modules whose network is among their hyper-parameters, by save_hyperparameters()."""

from __future__ import annotations

import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    load_from_checkpoint,
    take_adapter,
)
from support.models.networks import state_bits
from support.runs.lightning_versions import ANY_OBJECTS
from support.runs.training import Data, assert_same_tensors, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")
TARGETS = ["net.body.0", "net.body.3", "net.head"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x))


class Around(L.LightningModule):
    """As in lightning-hydra-template."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.hparams["lr"])


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def fitted(path: Path, model: Around | None = None, **options: Any) -> tuple[Around, Path]:
    """A trained model, and its checkpoint that was saved while a validation had it merged."""
    model = Around(network()) if model is None else model
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "init_lora_weights": False}
    callback = LoRACallback(save="merged", **defaults | options)
    saves = ModelCheckpoint(path, "merged", monitor="val_loss", save_top_k=1, enable_version_counter=False)
    make_trainer(path, callback, saves, max_epochs=1).fit(model, Data())
    return model, path / "merged.ckpt"


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.randn(8, 6, generator=torch.Generator().manual_seed(3)))
    return found


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["net.head"], "bias": "all"}], ids=["factors", "a head"])
def test_a_merged_checkpoint_holds_the_network_without_the_adapter_and_every_door_adds_it_once(tmp_path, options):
    if "modules_to_save" in options:
        options = {**options, "exclude_modules": ["net.head"]}
    model, file = fitted(tmp_path, **options)
    before = state_bits(model)
    model.trainer.save_checkpoint(file)
    assert state_bits(model) == before

    with zipfile.ZipFile(file) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert not [arg for _, arg, _ in pickletools.genops(pickled) if "lightning_lora" in str(arg)]
    net = torch.load(file, weights_only=False)["hyper_parameters"]["net"]
    assert type(net.head) is nn.Linear
    assert_same_tensors(net.state_dict(), network().state_dict())

    plain = Around.load_from_checkpoint(file, **ANY_OBJECTS)
    torch.testing.assert_close(answers(plain), answers(model), rtol=1e-5, atol=1e-6)
    assert type(plain.net.head) is nn.Linear
    loaded = load_from_checkpoint(Around, file, weights_only=False)
    assert torch.equal(answers(loaded), answers(model))
    with disable_adapter(loaded):
        assert torch.equal(answers(loaded), answers(network()))


def test_a_checkpoint_that_a_merged_validation_saved_is_the_same(tmp_path):
    model, file = fitted(tmp_path)
    torch.testing.assert_close(answers(Around.load_from_checkpoint(file, **ANY_OBJECTS)), answers(model))


def test_attached_adapters_are_in_the_weights_and_not_in_the_network(tmp_path):
    inject(other := Around(network()), LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model, file = fitted(tmp_path, attach={"style": take_adapter(other)})
    plain = Around.load_from_checkpoint(file, **ANY_OBJECTS)
    assert type(plain.net.head) is nn.Linear
    torch.testing.assert_close(answers(plain), answers(model), rtol=1e-5, atol=1e-6)


class Uncopied(Network):
    locked = True

    def __deepcopy__(self, memo: Any) -> Any:
        if self.locked and hasattr(self.head, "lora_A"):
            raise TypeError("holds a lock")
        return Uncopied()  # for hparams_initial


def test_a_network_that_cannot_be_copied_stays_and_is_named_with_a_way_out(tmp_path, monkeypatch):
    torch.manual_seed(1)
    with pytest.warns(
        UserWarning, match=r"'net' is the adapted network.*holds a lock.*ignore=\['net'\].*merge_after_fit=True"
    ):
        model, file = fitted(tmp_path, Around(Uncopied()))
    assert "lora_A" in dict(torch.load(file, weights_only=False)["hyper_parameters"]["net"].head.named_parameters())
    monkeypatch.setattr(Uncopied, "locked", False)  # where the file is read
    with pytest.raises(LoRAError, match="merged weights"):
        Around.load_from_checkpoint(file, strict=False, **ANY_OBJECTS)
    assert torch.equal(answers(load_from_checkpoint(Around, file, weights_only=False)), answers(model))


def test_a_network_whose_weights_are_divided_over_ranks_stays_and_is_named(tmp_path, monkeypatch):
    model, file = fitted(tmp_path)
    monkeypatch.setattr(sys.modules["lightning_lora.exchange.checkpoint_of_model"], "is_divided", lambda handle: True)
    with pytest.warns(UserWarning, match=r"'net' is the adapted network.*divided over ranks.*ignore=\['net'\]"):
        model.trainer.save_checkpoint(file)
    with pytest.raises(LoRAError, match="merged weights"):
        Around.load_from_checkpoint(file, **ANY_OBJECTS)


class AroundTwo(Around):
    def __init__(self, net: nn.Module, after: nn.Module, unused: int = 0, lr: float = 0.1) -> None:
        super().__init__(net, lr)
        self.save_hyperparameters()
        self.after = after

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.net(x))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["after.1"]}], ids=["factors", "a head"])
def test_each_of_two_networks_is_written_without_its_adapter(tmp_path, options):
    def after() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    model, file = fitted(tmp_path, AroundTwo(network(), after()), target_modules=[*TARGETS, "after.0"], **options)
    saved = torch.load(file, weights_only=False)["hyper_parameters"]
    for name, first in (("net", network()), ("after", after())):
        assert not any("lora" in str(each) for each in saved[name].modules())
        assert_same_tensors(saved[name].state_dict(), first.state_dict())
    plain = AroundTwo.load_from_checkpoint(file, **ANY_OBJECTS)
    torch.testing.assert_close(answers(plain), answers(model), rtol=1e-5, atol=1e-6)
