"""A base parameter that is unfrozen during a fit has its trained values in every file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    combine,
    export_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    save_merged,
    take_adapter,
)
from lightning_lora.adapter.renaming import by_network_names
from lightning_lora.exchange.save_load import read_adapter
from support.files.expected_weights import merge_and_check
from support.models.peers import TENSORS
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.notices import quiet_peers
from support.runs.training import fit_model, make_trainer, own_random_stream

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen"),
    pytest.mark.filterwarnings("ignore:The optimizer contains frozen parameters"),
]
LAYERS: dict[str, Any] = {"r": 2, "target_modules": ["a", "b"]}


class Network(nn.Module):
    """PEFT's modules_to_save takes pre_head too where it names head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.pre_head, self.head = nn.Linear(8, 8), nn.Linear(8, 10)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.b(self.norm(self.a(self.embed(tokens)).relu())).mean(1)
        result: torch.Tensor = self.head(self.pre_head(x))
        return result


class Net(L.LightningModule):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        with own_random_stream(7):
            self.net = Network(tied)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(tokens)
        return result

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch), batch.sum(1) % 10)

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Unfreezes(L.Callback):
    """Makes some of the base trainable in the second epoch."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            for name in self.names:
                pl_module.get_parameter(name).requires_grad_(True)


def tokens() -> torch.Tensor:
    return torch.arange(80).mul(7).remainder(10).view(16, 5)


def batches() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(tokens(), batch_size=8)  # type: ignore[arg-type]


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens())
    return result


def fit(path: Path, names: list[str], options: dict[str, Any], tied: bool = False, epochs: int = 3) -> Net:
    torch.manual_seed(0)
    model = Net(tied)
    callbacks = [LoRACallback(**LAYERS | options), Unfreezes(names)]
    fit_model(path, model, *callbacks, data=batches(), saved=path / "adapter.ckpt", max_epochs=epochs)
    save_adapter(model, path / "folder")
    return model


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "the weight of an adapted layer and biases": (["net.a.weight", "net.a.bias", "net.norm.bias"], {}),
    "beside magnitudes": (["net.norm.weight", "net.a.weight"], {"use_dora": True}),
    "beside a start": (["net.norm.weight"], {"init_lora_weights": "pissa"}),
    "a weight that an entry of PEFT takes": (["net.pre_head.weight"], {"modules_to_save": ["head"]}),
    "a tied weight": (["net.embed.weight"], {}),
}


def loaded(source: Any, tied: bool) -> torch.Tensor:
    load_adapter(model := Net(tied), source)
    return answers(model)


def exported(path: Path, tied: bool) -> torch.Tensor:
    export_adapter(path / "adapter.ckpt", path / "exported")
    return loaded(path / "exported", tied)


def saved_again(path: Path, tied: bool) -> torch.Tensor:
    load_adapter(model := Net(tied), path / "folder")
    save_adapter(model, path / "again")
    return loaded(path / "again", tied)


def combined(path: Path, tied: bool) -> torch.Tensor:
    return loaded(combine([path / "folder", path / "adapter.ckpt"], [0.5, 0.5]), tied)


def merged_on_disk(path: Path, tied: bool) -> torch.Tensor:
    plain = Net(tied)
    torch.save(plain.state_dict(), path / "base.pt")
    merge_and_check(path / "base.pt", path / "folder", path / "out.pt")
    plain.load_state_dict(torch.load(path / "out.pt"))
    return answers(plain)


def merged_in_memory(path: Path, tied: bool) -> torch.Tensor:
    load_adapter(model := Net(tied), path / "folder")
    save_merged(model, path / "merged")
    plain = Net(tied)
    plain.load_state_dict(load_file(path / "merged" / "model.safetensors"))
    return answers(plain)


def predicted(path: Path, tied: bool) -> torch.Tensor:
    options = read_adapter(path / "folder").config
    trainer = make_trainer(path, LoRACallback(options))
    return torch.cat(trainer.predict(Net(tied), batches(), ckpt_path=path / "adapter.ckpt", **PLAIN_TYPES_ONLY))


def by_peft(path: Path, tied: bool) -> torch.Tensor:
    model = Net(tied)
    model.net = peft.PeftModel.from_pretrained(model.net, path / "folder").base_model.model
    return answers(model)


DOORS: dict[str, Callable[[Path, bool], torch.Tensor]] = {
    "folder": lambda path, tied: loaded(path / "folder", tied),
    "checkpoint": lambda path, tied: loaded(path / "adapter.ckpt", tied),
    "tensor file": lambda path, tied: loaded(path / "folder" / TENSORS, tied),
    "load_from_checkpoint": lambda path, tied: answers(load_from_checkpoint(Net, path / "adapter.ckpt")),
    "export": exported,
    "saved again": saved_again,
    "combine": combined,
    "merge": merged_on_disk,
    "save_merged": merged_in_memory,
    "predict": predicted,
    "peft": by_peft,
}
IMPOSSIBLE = {  # for reasons that their own tests show
    ("beside magnitudes", "combine"),
    ("a weight that an entry of PEFT takes", "export"),
    ("a tied weight", "peft"),  # which unties it
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_door_gives_the_trained_values_of_a_weight_that_was_unfrozen_later(tmp_path, case: str):
    names, options = CASES[case]
    tied = case == "a tied weight"
    model = fit(tmp_path, names, options, tied)
    assert all((model.get_parameter(n) - Net(tied).get_parameter(n)).abs().max() > 1e-2 for n in names)
    expected = answers(model)
    wrong = {}
    for name, door in DOORS.items():
        if (case, name) not in IMPOSSIBLE:
            difference = (door(tmp_path, tied) - expected).abs().max().item()
            wrong |= {name: difference} if difference > 1e-5 else {}
    assert wrong == {}
    for source in ("folder", "adapter.ckpt"):  # a weight is named as trained or as frozen, and never as both
        adapter = by_network_names(read_adapter(tmp_path / source))
        assert adapter.tensors.keys() >= {name.removeprefix("net.") for name in names}
        assert adapter.tensors.keys().isdisjoint(adapter.fingerprint)


def test_what_a_second_fit_unfroze_is_read_from_folder_and_checkpoint(tmp_path):
    model = fit(tmp_path, [], {})
    trainer = make_trainer(tmp_path, LoRACallback(**LAYERS))
    model.net.norm.requires_grad_(True)
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    save_adapter(model, tmp_path / "second")
    for source in (tmp_path / "second.ckpt", tmp_path / "second"):
        assert torch.equal(loaded(source, False), answers(model))


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_run_resumed_after_the_unfreezing_goes_on_as_if_uninterrupted(tmp_path, kind: Any):
    """From a file that says that the weight was trained; optimizers hold it from the start, frozen at first."""
    whole = fit(tmp_path / "whole", ["net.norm.weight"], {"save": kind}, epochs=4)
    fit(tmp_path / "part", ["net.norm.weight"], {"save": kind}, epochs=3)
    model = Net()
    model.net.norm.weight.requires_grad_(True)
    trainer = make_trainer(tmp_path, LoRACallback(save=kind, **LAYERS), Unfreezes([]), max_epochs=4)

    class Again(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.get_parameter("net.norm.weight").requires_grad_(True)

    trainer.callbacks.append(Again())
    trainer.fit(model, batches(), ckpt_path=tmp_path / "part" / "adapter.ckpt", **PLAIN_TYPES_ONLY)
    assert torch.equal(answers(model), answers(whole))


def test_a_frozen_weight_without_values_tells_nothing_of_the_base():
    torch.manual_seed(0)
    model = Network()
    inject(model, LoRAConfig(r=2, target_modules=["a"]))
    adapter = take_adapter(model)
    assert "norm.weight" in adapter.fingerprint
    model.norm.to("meta")
    partial = take_adapter(model)
    assert partial.fingerprint.keys() == {each for each in adapter.fingerprint if not each.startswith("norm.")}
