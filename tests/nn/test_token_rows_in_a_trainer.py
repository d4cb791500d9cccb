"""A Trainer on a model of which rows of tables are trained: evaluated merged, saved, resumed and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, LoRAError, load_adapter, load_from_checkpoint, merged, save_adapter
from lightning_lora.formats.lightning_checkpoint import Kind
from lightning_lora.nn.adapted_weights import adapted_layers
from support.tables import NUMBER, ROWS
from support.tables import Net as Network
from support.training import make_trainer, own_random_stream

KINDS: list[Kind] = ["adapter", "merged", "full"]
OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["body"],
    "trainable_token_indices": {"net.emb": ROWS},
    "use_rslora": True,
    "bias": "all",
    "modules_to_save": ["norm"],
}


class Net(L.LightningModule):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        with own_random_stream(3):
            self.net, self.norm = Network(tied=tied), nn.LayerNorm(NUMBER)
        self.merged_in_validation: list[bool] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.net(tokens))
        return result

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].flatten())

    def validation_step(self, batch: Any) -> None:
        self.merged_in_validation.append(all(layer.lora.undo for layer in adapted_layers(self).values()))
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)


def tokens() -> torch.Tensor:
    with own_random_stream(4):
        return torch.randint(NUMBER, (8, 12))


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(tokens()), batch_size=4)


def fit(model: Net, path: Path, save: Kind, epochs: int, resume: Path | None = None, **options: Any) -> L.Trainer:
    trainer = make_trainer(path, LoRACallback(save=save, seed=1, **OPTIONS, **options), max_epochs=epochs)
    trainer.fit(model, data(), data(), ckpt_path=resume)
    return trainer


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("save", KINDS)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, save: Kind, tied: bool):
    fit(whole := Net(tied), tmp_path, save, 4)
    trainer = fit(first := Net(tied), tmp_path, save, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert all(first.merged_in_validation)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    ends = {"net.emb.lora_rows", "net.head.lora_rows"} if tied else {"net.emb.lora_rows"}
    assert {name for name in state if "rows" in name} == (ends if save != "merged" else set())
    assert ("net.emb.weight" in state) == (save != "adapter")
    fit(second := Net(tied), tmp_path, save, 4, resume=tmp_path / "half.ckpt")
    found, expected, fresh = values(second), values(whole), values(Net(tied))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (expected["net.emb.lora_rows"] - fresh["net.emb.weight"][list(ROWS)]).abs().amin() > 1e-6
    assert all(torch.equal(expected[name], fresh[name]) for name in ("net.emb.weight", "net.head.weight"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("save", KINDS)
def test_a_checkpoint_of_each_kind_is_loaded_and_tested(tmp_path, save: Kind, tied: bool):
    trainer = fit(model := Net(tied), tmp_path, save, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = model(tokens())
    loaded = load_from_checkpoint(Net, tmp_path / "a.ckpt")
    assert torch.equal(loaded(tokens()), expected)
    load_adapter(again := Net(tied), tmp_path / "a.ckpt")
    assert torch.equal(again(tokens()), expected)
    if save == "merged":
        plain = Net(tied)
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        plain.load_state_dict(content["state_dict"])
        with merged(again):
            assert torch.equal(plain(tokens()), again(tokens()))
        ends = [content["state_dict"][f"net.{end}.weight"] for end in ("emb", "head")]
        assert (ends[0].data_ptr() == ends[1].data_ptr()) == tied  # written once
    (result,) = trainer.validate(Net(tied), data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert result["loss"] == pytest.approx(float(trainer.callback_metrics["loss"]))


def test_other_values_in_a_table_of_trained_rows_are_no_other_base(tmp_path):
    """New rows of a table are others in each program."""
    trainer = fit(model := Net(), tmp_path, "adapter", 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = Net()
    with torch.no_grad():
        other.net.emb.weight[list(ROWS)] = 7.0
    load_adapter(other, tmp_path / "a.ckpt")
    assert torch.equal(other(tokens()), model(tokens()))
    fit(other := Net(), tmp_path, "adapter", 2, resume=tmp_path / "a.ckpt")


def test_averaged_weights_are_of_the_same_rows(tmp_path):
    """An average of whole numbers, as a buffer's would be, may be others."""
    average = EMAWeightAveraging(decay=0.5)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[LoRACallback(seed=1, **OPTIONS), average],
    )
    trainer.fit(model := Net(), data(), data())
    with merged(model):
        moved = (model.net.emb.weight - Net().net.emb.weight).abs().amax(1).gt(1e-3).nonzero().flatten()
    assert moved.tolist() == list(ROWS)


def test_options_come_from_plain_types():
    for indices in ([3, 1], {"a.b": [3, 1]}):
        config = LoRACallback(target_modules=["x"], trainable_token_indices=indices).config
        assert LoRAConfig.from_dict(config.to_dict()) == config


def test_a_folder_of_a_tie_that_peft_does_not_know_is_refused(tmp_path):
    fit(model := Net(), tmp_path, "adapter", 1)
    with pytest.raises(LoRAError, match=r"'net\.head' shares its weight with 'net\.emb'"):
        save_adapter(model, tmp_path / "folder")
