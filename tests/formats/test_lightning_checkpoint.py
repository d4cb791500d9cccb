"""What each kind of checkpoint holds, with each way to write it and to read it."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRAConfig, disable_adapter, inject, load_adapter, load_from_checkpoint, merged, unload
from support.covering import covering
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import (
    BuiltInConfigureModel,
    Data,
    Net,
    RebuiltInSetup,
    assert_same_tensors,
    make_trainer,
    outputs,
    tensors,
    weights,
)
from support.runs.with_callback import TARGETS, lora, run, trained

KINDS = ("adapter", "merged", "full")
FACTORS = {f"{name}.{factor}" for name in TARGETS for factor in ("lora_A", "lora_B")}
BUFFERS = {f"body.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
TRAINED = {"body.1.weight", "body.1.bias", "body.0.bias", "body.3.bias", "head.bias"}
TRAINABLE = {"modules_to_save": ["body.1"], "bias": "lora_only"}


class SavesInside(L.Callback):
    """Saves in the middle of validation, while the model is merged."""

    def __init__(self, path: Path, hook: str, weights_only: bool) -> None:
        self.path, self.weights_only = path, weights_only
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.path, weights_only=self.weights_only)


HOOKS = ("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")


def saved(path: Path, kind: str, how: str, weights_only: bool, **options: Any) -> tuple[Net, Path]:
    """A model after two epochs, and its checkpoint of the same moment."""
    file = path / "saved.ckpt"
    callbacks: list[L.Callback] = [lora(save=kind, **options)]
    if how == "ModelCheckpoint":
        callbacks.append(ModelCheckpoint(path, "saved", save_weights_only=weights_only, enable_version_counter=False))
    elif how in HOOKS:
        callbacks.append(SavesInside(file, how, weights_only))
    model = Net(width=7, seed=4)
    torch.manual_seed(0)
    trainer = make_trainer(path, *callbacks, max_epochs=2)
    run(trainer, "fit", model)
    if how == "after fit":
        trainer.save_checkpoint(file, weights_only=weights_only)
    return model, file


def merged_by_hand(model: Net, name: str) -> torch.Tensor:
    layer = model.get_submodule(name)
    delta = layer.lora_B.double() @ layer.lora_A.double() * (layer.lora.spec.alpha / layer.lora.spec.r)
    return (layer.weight.double() + delta).float().detach()


@pytest.mark.parametrize(
    ("how", "kind", "weights_only"),
    covering(["ModelCheckpoint", "after fit", *HOOKS], KINDS, [False, True], meet=1),
)
def test_checkpoint_of_each_kind_holds_the_right_tensors_and_is_read(tmp_path, how: str, kind: str, weights_only: bool):
    model, file = saved(tmp_path, kind, how, weights_only, **TRAINABLE)
    checkpoint = torch.load(file, weights_only=True)
    state, live, base = checkpoint["state_dict"], model.state_dict(), weights(Net(width=7, seed=4))
    assert ("optimizer_states" in checkpoint) is not weights_only
    training_changes = FACTORS | BUFFERS | TRAINED
    expected = {"adapter": training_changes, "merged": base.keys(), "full": base.keys() | FACTORS}[kind]
    assert state.keys() == expected
    for name, tensor in state.items():
        if kind == "merged" and name.removesuffix(".weight") in TARGETS:
            assert torch.equal(tensor, merged_by_hand(model, name.removesuffix(".weight")))
        else:
            assert torch.equal(tensor, live[name]), name
    if kind == "merged":
        with merged(model):
            assert all(torch.equal(state[f"{name}.weight"], model.get_parameter(f"{name}.weight")) for name in TARGETS)
            plain = Net.load_from_checkpoint(file, strict=True, **PLAIN_TYPES_ONLY)  # by Lightning alone
            assert torch.equal(outputs(plain), outputs(model))
        assert_same_tensors(checkpoint["lora"]["adapter"], {n: live[n] for n in live if n in training_changes})
    if kind != "full":
        frozen = {name: tensor for name, tensor in base.items() if name not in training_changes}
        assert frozen.keys() == {f"{name}.weight" for name in TARGETS}
        for path, tensor in tensors(checkpoint):
            assert not any(torch.equal(tensor, other) for other in frozen.values()), path

    load_adapter(fresh := Net(width=7, seed=4), file)
    inject(injected := Net(width=7, seed=4), lora(**TRAINABLE).config)
    load_adapter(injected, file)
    built = load_from_checkpoint(Net, file, lr=0.25)
    assert (built.hparams["width"], built.hparams["lr"]) == (7, 0.25)
    for read in (fresh, injected, built):
        assert_same_tensors(read.state_dict(), model.state_dict())
        with disable_adapter(read):
            assert torch.equal(outputs(read), outputs(Net(width=7, seed=4)))


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_checkpoint_describes_its_kind_config_and_layers_in_plain_types(tmp_path, kind: str):
    def check_plain(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None), torch.Tensor), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check_plain(item)

    _, file = saved(tmp_path, kind, "after fit", False, rank_pattern={"head": 1}, **TRAINABLE)
    meta = torch.load(file, weights_only=True)["lora"]
    check_plain(meta)
    assert (meta["format_version"], meta["kind"]) == (2, kind)
    assert LoRAConfig.from_dict(meta["config"]) == lora(rank_pattern={"head": 1}, **TRAINABLE).config
    assert meta["layers"] == [["Linear", 4, ["body.0", "body.3"]], ["Linear", 8, ["head"]]]
    assert meta["fingerprint"].keys() == {f"{name}.weight" for name in TARGETS}


def test_a_full_checkpoint_brings_its_base(tmp_path):
    model, file = saved(tmp_path, "full", "after fit", False, **TRAINABLE)
    built = load_from_checkpoint(Net, file, seed=5)
    assert_same_tensors(built.state_dict(), model.state_dict())
    with disable_adapter(built):
        assert torch.equal(outputs(built), outputs(Net(width=7, seed=4)))
    # A model that was trained on another base goes on with that of the checkpoint.
    other = trained(tmp_path, Net(width=7, seed=5), lora(**TRAINABLE))
    trainer = make_trainer(tmp_path, lora(**TRAINABLE), max_epochs=3)
    trainer.fit(other, Data(), ckpt_path=file, **PLAIN_TYPES_ONLY)
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    fresh = Net(width=7, seed=4)
    load_adapter(fresh, tmp_path / "adapter.ckpt")
    assert torch.equal(outputs(fresh), outputs(other))


@pytest.mark.parametrize(
    ("model_class", "kind", "merged_eval"),
    covering([Net, BuiltInConfigureModel, RebuiltInSetup], KINDS, [True, False], meet=1),
)
def test_best_is_tested_to_the_number_that_was_logged(tmp_path, model_class: type[Net], kind: str, merged_eval: bool):
    def trainer() -> L.Trainer:
        worst = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_top_k=1)
        return make_trainer(tmp_path, lora(save=kind, merged_eval=merged_eval, **TRAINABLE), worst, max_epochs=3)

    model, first, second = model_class(), trainer(), trainer()
    run(first, "fit", model)
    best, last = first.checkpoint_callback.best_model_score.item(), first.callback_metrics["val_loss"].item()
    assert best > last, "the epoch that is tested is not the last"
    first.test(model, first.datamodule, ckpt_path="best", **PLAIN_TYPES_ONLY, verbose=False)
    assert first.callback_metrics["test_loss"].item() == best
    file = first.checkpoint_callback.best_model_path
    if model_class is not RebuiltInSetup:  # which has no layers before setup
        assert torch.equal(outputs(load_from_checkpoint(model_class, file)), outputs(model))
    second.test(model_class(), first.datamodule, ckpt_path=file, **PLAIN_TYPES_ONLY, verbose=False)
    assert second.callback_metrics["test_loss"].item() == best


class OwnHooks(Net):
    """A user's module that saves and reads something of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = "mine"
        self.seen.append(sorted(checkpoint["state_dict"]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.append(checkpoint["own"])


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_users_own_checkpoint_hooks_are_called(tmp_path, kind: str):
    model = OwnHooks()
    trainer = make_trainer(tmp_path, lora(save=kind))
    run(trainer, "fit", model)
    trainer.save_checkpoint(tmp_path / "a")
    assert "head.weight" in model.seen.pop(), "the hook sees the whole state dict"
    trainer.test(model, trainer.datamodule, ckpt_path=tmp_path / "a", verbose=False, **PLAIN_TYPES_ONLY)
    assert model.seen == ["mine"]


@pytest.mark.parametrize(
    ("copier", "while_merged"), [(copy.deepcopy, True), (lambda model: pickle.loads(pickle.dumps(model)), False)]
)
def test_copy_of_the_module_saves_and_loads_by_itself(tmp_path, copier: Any, while_merged: bool):
    model = trained(tmp_path, Net(), lora())
    before = weights(model)
    model.trainer = None
    with merged(model) if while_merged else nullcontext():
        twin = copier(model)
    assert_same_tensors(model.state_dict(), before)
    lightning_lora_state = lora_checkpoint(twin)
    with torch.no_grad():
        twin.head.lora_B.add_(1)
    later = lora_checkpoint(twin)
    assert torch.equal(later["state_dict"]["head.lora_B"], lightning_lora_state["state_dict"]["head.lora_B"] + 1)
    model.on_load_checkpoint(later)
    model.load_state_dict(later["state_dict"])
    assert torch.equal(model.head.lora_B, before["head.lora_B"] + 1)
    assert lora_checkpoint(model)["state_dict"].keys() == FACTORS | BUFFERS
    unload(twin)
    assert "head.lora_A" in model.state_dict()


def lora_checkpoint(model: Net) -> dict[str, Any]:
    checkpoint = {"state_dict": weights(model)}
    model.on_save_checkpoint(checkpoint)
    return checkpoint


def test_unload_takes_the_checkpoint_hooks_out(tmp_path):
    model = Net()
    trainer = make_trainer(tmp_path, lora())
    run(trainer, "fit", model)
    assert {"on_save_checkpoint", "on_load_checkpoint"} <= vars(model).keys()
    unload(model)
    assert vars(model).keys() == vars(Net()).keys() | {"_trainer"}
    trainer.save_checkpoint(tmp_path / "a")
    checkpoint = torch.load(tmp_path / "a", weights_only=True)
    assert checkpoint["state_dict"].keys() == Net().state_dict().keys()
    assert "lora" not in checkpoint


class TwoNames(Net):
    """Its head is registered under a second name too."""

    def build_head(self) -> None:
        super().build_head()
        self.parts = torch.nn.ModuleList([self.head])


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_checkpoint_of_a_layer_with_two_names_is_resumed_and_loaded_bit_for_bit(tmp_path, kind: str):
    model = trained(tmp_path, TwoNames(), lora(save=kind), max_epochs=1)
    model.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    fresh = TwoNames()
    make_trainer(tmp_path, lora(save=kind), max_epochs=1).fit(fresh, Data(3), ckpt_path=tmp_path / "saved.ckpt")
    assert model.head.lora_B.any()
    for read in (fresh, load_from_checkpoint(TwoNames, tmp_path / "saved.ckpt")):
        assert_same_tensors(read.state_dict(), model.state_dict())
