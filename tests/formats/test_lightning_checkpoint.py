"""What each kind of checkpoint holds, with each way to write it and to read it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRAConfig, disable_adapter, inject, load_adapter, load_from_checkpoint, merged, unload
from support.lightning_versions import PLAIN_TYPES_ONLY
from support.runs import TARGETS, lora, run, trained
from support.training import (
    BuiltInConfigureModel,
    Data,
    Net,
    RebuiltInSetup,
    assert_same_tensors,
    inputs,
    make_trainer,
    outputs,
    tensors,
    weights,
)

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


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("how", ["ModelCheckpoint", "after fit", *HOOKS])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_each_kind_holds_the_right_tensors(tmp_path, kind: str, how: str, weights_only: bool):
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
        assert_same_tensors(checkpoint["lora"]["adapter"], {n: live[n] for n in live if n in training_changes})
    if kind != "full":
        frozen = {name: tensor for name, tensor in base.items() if name not in training_changes}
        assert frozen.keys() == {f"{name}.weight" for name in TARGETS}
        for path, tensor in tensors(checkpoint):
            assert not any(torch.equal(tensor, other) for other in frozen.values()), path


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_describes_its_kind_config_and_layers_in_plain_types(tmp_path, kind: str):
    def check_plain(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None), torch.Tensor), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check_plain(item)

    _, file = saved(tmp_path, kind, "after fit", False, rank_pattern={"head": 1}, **TRAINABLE)
    meta = torch.load(file, weights_only=True)["lora"]
    check_plain(meta)
    assert (meta["format_version"], meta["kind"]) == (1, kind)
    assert LoRAConfig.from_dict(meta["config"]) == lora(rank_pattern={"head": 1}, **TRAINABLE).config
    assert meta["layers"] == [["Linear", 4, ["body.0", "body.3"]], ["Linear", 8, ["head"]]]
    assert meta["fingerprint"].keys() == {f"{name}.weight" for name in TARGETS}


@pytest.mark.parametrize("how", ["ModelCheckpoint", "after fit"])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_into_a_fresh_model(tmp_path, kind: str, how: str, weights_only: bool):
    model, file = saved(tmp_path, kind, how, weights_only, **TRAINABLE)
    expected = outputs(model)
    torch.manual_seed(9)
    fresh, injected = Net(width=7, seed=4), Net(width=7, seed=4)
    assert load_adapter(fresh, file) == TARGETS
    inject(injected, lora(**TRAINABLE).config)
    load_adapter(injected, file)
    built = load_from_checkpoint(Net, file, lr=0.25)
    assert (built.hparams["width"], built.hparams["lr"]) == (7, 0.25)
    assert not torch.equal(expected, outputs(Net(width=7, seed=4)))
    for read in (fresh, injected, built):
        assert torch.equal(outputs(read), expected)
        assert_same_tensors(read.state_dict(), model.state_dict())
        with disable_adapter(read):
            assert torch.equal(outputs(read), outputs(Net(width=7, seed=4)))


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


@pytest.mark.parametrize("kind", KINDS)
def test_load_from_checkpoint_restores_a_model_built_in_configure_model(tmp_path, kind: str):
    model = trained(tmp_path, BuiltInConfigureModel(), lora(save=kind), SavesInside(tmp_path / "a", HOOKS[0], False))
    built = load_from_checkpoint(BuiltInConfigureModel, tmp_path / "a")
    assert_same_tensors(built.state_dict(), model.state_dict())


@pytest.mark.parametrize("model_class", [Net, BuiltInConfigureModel, RebuiltInSetup])
@pytest.mark.parametrize("merged_eval", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_best_is_tested_to_the_number_that_was_logged(tmp_path, kind: str, merged_eval: bool, model_class: type[Net]):
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
    second.test(model_class(), first.datamodule, ckpt_path=file, **PLAIN_TYPES_ONLY, verbose=False)
    assert second.callback_metrics["test_loss"].item() == best


WITHOUT_THIS_PACKAGE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from support.lightning_versions import PLAIN_TYPES_ONLY
from support.training import Net, outputs
torch.set_num_threads(1)
model = Net.load_from_checkpoint(sys.argv[2], strict=True, **PLAIN_TYPES_ONLY)
torch.save(outputs(model), sys.argv[3])
assert model.hparams["width"] == 7
assert "lightning_lora" not in sys.modules
"""


@pytest.mark.slow
def test_a_merged_checkpoint_is_read_by_a_program_without_this_package(tmp_path):
    model, file = saved(tmp_path, "merged", "ModelCheckpoint", False, **TRAINABLE)
    arguments = [str(Path(__file__).parents[1]), str(file), str(tmp_path / "outputs")]
    subprocess.run([sys.executable, "-c", WITHOUT_THIS_PACKAGE, *arguments], check=True, timeout=120)
    found = torch.load(tmp_path / "outputs", weights_only=True)
    with merged(model):
        assert torch.equal(found, outputs(model))


class OwnHooks(Net):
    """A user's module that saves and reads something of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = "mine"
        self.seen.append(sorted(checkpoint["state_dict"]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.append(checkpoint["own"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_own_checkpoint_hooks_are_called(tmp_path, kind: str):
    model = OwnHooks()
    trainer = make_trainer(tmp_path, lora(save=kind))
    run(trainer, "fit", model)
    trainer.save_checkpoint(tmp_path / "a")
    assert "head.weight" in model.seen.pop(), "the hook sees the whole state dict"
    trainer.test(model, trainer.datamodule, ckpt_path=tmp_path / "a", verbose=False, **PLAIN_TYPES_ONLY)
    assert model.seen == ["mine"]


@pytest.mark.parametrize("while_merged", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
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


class Counts(Net):
    """Hands out its own dictionary as extra state."""

    def prepare(self) -> None:
        super().prepare()
        self.counts = {"steps": 0}

    def get_extra_state(self) -> dict[str, int]:
        return self.counts

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.counts = state


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_copies_of_all_that_training_changes(tmp_path, kind: str):
    model = trained(tmp_path, Counts(), lora(save=kind, **TRAINABLE))
    model.on_save_checkpoint(checkpoint := {"state_dict": model.state_dict()})
    held = checkpoint["lora"]["adapter"] if kind == "merged" else checkpoint["state_dict"]
    before = {name: copy.deepcopy(value) for name, value in held.items() if name in FACTORS | BUFFERS | TRAINED}
    model.counts["steps"] = 1
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert held["_extra_state"] == {"steps": 0}
    assert_same_tensors({name: held[name] for name in before}, before)


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


def test_checkpoint_after_a_new_base_was_loaded_belongs_to_that_base(tmp_path):
    model, other = trained(tmp_path, Net(), lora()), Net(seed=2)
    model.load_state_dict(other.state_dict())
    trainer = make_trainer(tmp_path, lora())
    run(trainer, "fit", model)
    trainer.save_checkpoint(tmp_path / "a")
    fresh = Net(seed=2)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(inputs()), model(inputs()))


class TwoNames(Net):
    """Its head is registered under a second name too."""

    def build_head(self) -> None:
        super().build_head()
        self.parts = torch.nn.ModuleList([self.head])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_a_layer_with_two_names_is_resumed_bit_for_bit(tmp_path, kind: str):
    model = trained(tmp_path, TwoNames(), lora(save=kind), max_epochs=1)
    model.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    fresh = TwoNames()
    make_trainer(tmp_path, lora(save=kind), max_epochs=1).fit(fresh, Data(3), ckpt_path=tmp_path / "saved.ckpt")
    assert model.head.lora_B.any()
    assert_same_tensors(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_load_from_checkpoint_builds_a_module_with_a_layer_under_two_names(tmp_path, kind: str):
    model = trained(tmp_path, TwoNames(), lora(save=kind), max_epochs=1)
    model.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = load_from_checkpoint(TwoNames, tmp_path / "saved.ckpt")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
