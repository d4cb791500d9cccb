"""A Trainer on a model of which single parameters are adapted: evaluated merged, saved, resumed and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, load_adapter, load_from_checkpoint, merged, save_adapter
from lightning_lora.formats.lightning_checkpoint import Kind
from lightning_lora.nn.adapted_weights import adapted_layers
from support.parameters import Experts
from support.training import make_trainer, own_random_stream

KINDS: list[Kind] = ["adapter", "merged", "full"]
OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["head"],
    "target_parameters": ["weight_ih_l0", "weight_hh_l0", "experts.down_proj"],
    "modules_to_save": ["norm"],
}


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with own_random_stream(3):
            self.rnn, self.experts = nn.LSTM(5, 5, batch_first=True), Experts()
            self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 1)
        self.merged_in_validation: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.experts(self.rnn(x)[0]))).mean(1)
        return result

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        self.merged_in_validation.append(all(layer.lora.undo for layer in adapted_layers(self).values()))
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def data() -> DataLoader[Any]:
    with own_random_stream(4):
        return DataLoader(TensorDataset(torch.randn(8, 4, 5), torch.randn(8, 1)), batch_size=4)


def fit(model: Net, path: Path, save: Kind, epochs: int, resume: Path | None = None, **options: Any) -> L.Trainer:
    trainer = make_trainer(path, LoRACallback(save=save, seed=1, **OPTIONS, **options), max_epochs=epochs)
    trainer.fit(model, data(), data(), ckpt_path=resume)
    return trainer


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("save", KINDS)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, save: Kind):
    fit(whole := Net(), tmp_path, save, 4)
    trainer = fit(first := Net(), tmp_path, save, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert all(first.merged_in_validation)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert ("experts.down_proj" in state) == (save != "adapter")
    assert ("rnn.lora_A_weight_ih_l0" in state) == (save != "merged")
    fit(second := Net(), tmp_path, save, 4, resume=tmp_path / "half.ckpt")
    for name, value in values(second).items():
        assert torch.equal(value, values(whole)[name]), name
    moved = [name for name, value in values(whole).items() if "lora_B" in name and value.any()]
    assert len(moved) == 4
    fresh = values(Net())
    for name, value in values(whole).items():
        if name in fresh and not name.startswith("norm"):
            assert torch.equal(value, fresh[name]), name


@pytest.mark.parametrize("save", KINDS)
def test_a_checkpoint_of_each_kind_is_loaded_and_tested(tmp_path, save: Kind):
    trainer = fit(model := Net(), tmp_path, save, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    x = next(iter(data()))[0]
    expected = model(x)
    loaded = load_from_checkpoint(Net, tmp_path / "a.ckpt")
    assert torch.equal(loaded(x), expected)
    load_adapter(again := Net(), tmp_path / "a.ckpt")
    assert torch.equal(again(x), expected)
    save_adapter(again, tmp_path / "folder")
    load_adapter(third := Net(), tmp_path / "folder")
    assert torch.equal(third(x), expected)
    if save == "merged":
        plain = Net()
        plain.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
        with merged(again):
            assert torch.equal(plain(x), again(x))
    (result,) = trainer.validate(Net(), data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert result["loss"] == pytest.approx(float(trainer.callback_metrics["loss"]))


def test_another_base_is_refused_by_the_parameters_values(tmp_path):
    trainer = fit(Net(), tmp_path, "adapter", 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = Net()
    with torch.no_grad():
        other.experts.down_proj.mul_(1.05)
    with pytest.raises(ValueError, match=r"another base: values of 'experts\.down_proj'"):
        load_adapter(other, tmp_path / "a.ckpt")


def test_options_come_from_yaml_types():
    config = LoRACallback(target_modules=[], target_parameters=["a.b"]).config
    assert config == LoRAConfig(target_modules=(), target_parameters=("a.b",))
    assert LoRAConfig.from_dict(config.to_dict()) == config
