"""A Trainer on a model of which rows of tables and single parameters are trained: saved, resumed, loaded, averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    inject,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    merged,
    save_adapter,
)
from lightning_lora.nn.adapted_module import adapted_layers
from support.covering import covering
from support.models.parameters import Experts
from support.models.token_rows import NUMBER, ROWS
from support.runs.training import assert_same_tensors, fit_model, own_random_stream, weights

OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["body"],
    "target_parameters": ["weight_ih_l0", "weight_hh_l0", "experts.down_proj"],
    "trainable_token_indices": {"emb": ROWS},
    "use_rslora": True,
    "bias": "all",
    "modules_to_save": ["norm"],
}


class Net(L.LightningModule):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        with own_random_stream(3):
            self.emb, self.rnn, self.experts = nn.Embedding(NUMBER, 5), nn.LSTM(5, 5, batch_first=True), Experts()
            self.body, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, NUMBER, bias=False)
        if tied:
            self.head.weight = self.emb.weight
        self.merged_in_validation: list[bool] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.body(self.experts(self.rnn(self.emb(tokens))[0]))))
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


def fit(model: Net, path: Path, *callbacks: Any, epochs: int, resume: Path | None = None, **options: Any) -> L.Trainer:
    data = DataLoader(TensorDataset(tokens()), batch_size=4)
    lora = LoRACallback(seed=1, **OPTIONS, **options)
    return fit_model(path, model, lora, *callbacks, data=(data, data), ckpt_path=resume, max_epochs=epochs)


@pytest.mark.slow
@pytest.mark.parametrize(("save", "tied"), covering(["adapter", "merged", "full"], [False, True], meet=1))
def test_a_run_is_resumed_and_loaded_from_a_checkpoint_of_each_kind(tmp_path: Path, save: str, tied: bool):
    fit(whole := Net(tied), tmp_path, epochs=2, save=save)
    trainer = fit(first := Net(tied), tmp_path, epochs=1, save=save)
    trainer.save_checkpoint(path := tmp_path / "half.ckpt")
    assert all(first.merged_in_validation)
    state = torch.load(path, weights_only=True)["state_dict"]
    ends = {"emb.lora_rows", "head.lora_rows"} if tied else {"emb.lora_rows"}
    assert {name for name in state if "rows" in name} == (ends if save != "merged" else set())
    assert ("emb.weight" in state) == ("experts.down_proj" in state) == (save != "adapter")
    assert ("rnn.lora_A_weight_ih_l0" in state) == (save != "merged")

    fit(second := Net(tied), tmp_path, epochs=2, save=save, resume=path)
    found, expected, fresh = weights(second), weights(whole), weights(Net(tied))
    assert_same_tensors(found, expected)
    assert (expected["emb.lora_rows"] - fresh["emb.weight"][list(ROWS)]).abs().amin() > 1e-6
    assert len([name for name, value in expected.items() if "lora_B" in name and value.any()]) == 4
    kept = [name for name in fresh if not name.startswith("norm") and "bias" not in name]
    assert_same_tensors({name: expected[name] for name in kept}, {name: fresh[name] for name in kept})

    loaded, again, answer = load_from_checkpoint(Net, path), Net(tied), first(tokens())
    load_adapter(again, path)
    assert torch.equal(loaded(tokens()), answer)
    assert torch.equal(again(tokens()), answer)
    if save == "merged":
        plain = Net(tied)
        plain.load_state_dict(state)
        with merged(again):
            assert torch.equal(plain(tokens()), again(tokens()))
        assert (state["emb.weight"].data_ptr() == state["head.weight"].data_ptr()) == tied  # written once
    if tied:
        with pytest.raises(LoRAError, match="'head' shares its weight with 'emb'"):
            save_adapter(again, tmp_path / "folder")
    else:
        save_adapter(again, tmp_path / "folder")
        load_adapter(third := Net(tied), tmp_path / "folder")
        assert torch.equal(third(tokens()), answer)


def test_another_base_is_told_by_adapted_parameters_and_not_by_trained_rows(tmp_path: Path):
    trainer = fit(model := Net(), tmp_path, epochs=1)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    other = Net()
    with torch.no_grad():
        other.emb.weight[list(ROWS)] = 7.0  # new rows of a table are others in each program
    load_adapter(other, path)
    assert torch.equal(other(tokens()), model(tokens()))
    other = Net()
    with torch.no_grad():
        other.experts.down_proj.mul_(1.05)
    with pytest.raises(LoRAError, match=r"another base: values of 'experts\.down_proj'"):
        load_adapter(other, path)


def test_averaged_weights_are_of_the_same_rows(tmp_path: Path):
    """An average of whole numbers, as a buffer's would be, may be others."""
    fit(model := Net(), tmp_path, EMAWeightAveraging(decay=0.5), epochs=3)
    with merged(model):
        moved = (model.emb.weight - Net().emb.weight).abs().amax(1).gt(1e-3).nonzero().flatten()
    assert moved.tolist() == list(ROWS)


class TiedTables(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight
        self.seen: list[bool] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(is_merged(self))
        self.head(self.layer(self.table(batch[0])))


def test_each_validation_of_rows_in_tied_tables_is_merged(tmp_path: Path):
    model = TiedTables()
    config = LoRAConfig(r=2, target_modules=["layer"], trainable_token_indices={"table": [1]}, init_lora_weights=False)
    inject(model, config)
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[LoRACallback()])
    for _ in range(3):
        trainer.validate(model, DataLoader(TensorDataset(torch.arange(4)), 4), verbose=False)
        assert not is_merged(model)
    assert model.seen == [True, True, True]
