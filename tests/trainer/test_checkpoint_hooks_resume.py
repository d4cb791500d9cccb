"""Resuming from each kind of checkpoint, and what is refused instead of being loaded wrongly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    unload,
)
from support.covering import covering
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, outputs, weights
from support.runs.with_callback import BATCHES, TARGETS, lora, run, trained

KINDS = ("adapter", "merged", "full")
Make = Callable[[], tuple[Net, list[L.Callback]]]


def resume_and_compare(path: Path, make: Make, again: Make | None = None, epochs: int = 4, at: int = 1) -> Net:
    """An uninterrupted run and one that resumes from its checkpoint of epoch `at` end with the same numbers."""

    def start(make: Make, ckpt_path: str | None) -> tuple[Net, dict[str, Any]]:
        model, callbacks = make()
        saves = ModelCheckpoint(path, "{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer = make_trainer(path, *callbacks, saves, max_epochs=epochs)
        trainer.fit(model, Data(BATCHES), ckpt_path=ckpt_path, **PLAIN_TYPES_ONLY)
        return model, {
            "model": model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "steps": trainer.global_step,
        }

    torch.manual_seed(0)
    _, uninterrupted = start(make, None)
    torch.manual_seed(1)
    model, resumed = start(again or make, str(path / f"epoch={at}.ckpt"))
    assert resumed["optimizer"]["state"], "the optimizer has a state to compare"
    assert_same_tensors(resumed, uninterrupted)
    return model


@pytest.mark.core
@pytest.mark.parametrize(("earlier", "later"), [("adapter", "merged"), ("merged", "full"), ("full", "adapter")])
def test_run_resumed_with_another_kind_equals_the_uninterrupted_one(tmp_path, earlier: str, later: str):
    resume_and_compare(tmp_path, lambda: (Net(), [lora(save=earlier)]), lambda: (Net(), [lora(save=later)]))


def test_run_with_an_injected_part_resumes(tmp_path):
    def part() -> tuple[Net, list[L.Callback]]:
        model = Net()
        inject(model.body, LoRACallback(r=2, modules_to_save=["1"]).config)
        return model, [LoRACallback()]

    model = resume_and_compare(tmp_path, part)
    with disable_adapter(model):
        assert torch.equal(model.body.eval()(torch.ones(1, 6)), Net().body.eval()(torch.ones(1, 6)))


class Unfreezes(L.Callback):
    """Unfreezes one base layer when the second epoch starts, as BackboneFinetuning does."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= 1:
            pl_module.body[3].requires_grad_(True)


@pytest.mark.parametrize(("kind", "at"), covering(KINDS, [0, 1, 2], meet=1))
def test_what_another_callback_unfreezes_is_saved_and_resumed(tmp_path, kind: str, at: int):
    unfrozen = r"base parameters were unfrozen after injection \(body\.3\.weight, body\.3\.bias\)"
    with pytest.warns(UserWarning, match=unfrozen):
        model = resume_and_compare(tmp_path, lambda: (Net(), [lora(save=kind), Unfreezes()]), at=at)
    assert not torch.equal(model.body[3].weight, Net().body[3].weight)
    fresh = Net()
    load_adapter(fresh, tmp_path / "epoch=3.ckpt")
    built = load_from_checkpoint(Net, tmp_path / "epoch=3.ckpt")
    expected = outputs(model)
    for read in (model, fresh, built):
        assert torch.equal(outputs(read), expected)
        with disable_adapter(read):
            assert torch.equal(outputs(read), outputs(Net()))
        unload(read)
        assert_same_tensors(read.state_dict(), Net().state_dict())


def checkpoint(path: Path, kind: str = "adapter", **options: Any) -> Path:
    trainer = make_trainer(path, lora(save=kind, **options))
    run(trainer, "fit", Net())
    trainer.save_checkpoint(path / "a.ckpt")
    return path / "a.ckpt"


def refused(file: Path, message: str, model: Net | None = None, *, by_load: bool = True, **options: Any) -> None:
    """Fit, test and load_adapter all refuse the file, and the model keeps its values. Only load_adapter swaps."""
    trainer = make_trainer(file.parent, LoRACallback(), max_epochs=2)
    given = {"datamodule": Data(BATCHES), "ckpt_path": file, **PLAIN_TYPES_ONLY}
    doors = [partial(trainer.fit, **given), partial(trainer.test, **given)]
    if by_load:
        doors.append(lambda model: load_adapter(model, file))
    for door in doors:
        model = model or Net()
        inject(model, lora(**options).config)
        before = weights(model)
        with pytest.raises(LoRAError, match=message):
            door(model)
        assert_same_tensors(model.state_dict(), before)


def edited(file: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)
    return file


def test_a_full_checkpoint_without_one_base_key_is_refused(tmp_path):
    file = edited(checkpoint(tmp_path, "full"), lambda content: content["state_dict"].pop("head.bias"))
    message = r"the full checkpoint lacks 1 of the model's tensors, first 'head\.bias'"
    trainer = make_trainer(tmp_path, lora(), max_epochs=2)
    for door in (trainer.fit, trainer.test):
        model = Net()
        with pytest.raises(LoRAError, match=message):
            door(model, Data(BATCHES), ckpt_path=file, **PLAIN_TYPES_ONLY)
        assert torch.equal(model.body[0].weight, Net().body[0].weight)
    with pytest.raises(LoRAError, match=message):
        load_from_checkpoint(Net, file)


@pytest.mark.parametrize(
    ("kind", "key"),
    covering(KINDS, ["head.lora_A", "body.0.lora_B", "body.1.running_var", "body.1.bias"], meet=1),
)
def test_resuming_from_a_part_of_an_adapter_is_refused(tmp_path, kind: str, key: str):
    def cut(content: dict[str, Any]) -> None:
        (content["lora"]["adapter"] if kind == "merged" else content["state_dict"]).pop(key)

    options = {"modules_to_save": ["body.1"]}
    layer = key.removesuffix(".lora_A")
    by_load = key != "body.1.bias"  # which load_adapter gives its first value
    file = edited(checkpoint(tmp_path, kind, **options), cut)
    refused(file, rf"'{layer}(\.\w+)?' is missing", by_load=by_load, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_nan_or_inf_is_refused(tmp_path, kind: str):
    def spoil(content: dict[str, Any]) -> None:
        state = content["lora"]["adapter"] if kind == "merged" else content["state_dict"]
        state["head.lora_B"][0, 0] = float("inf")

    refused(edited(checkpoint(tmp_path, kind), spoil), r"'head\.lora_B' holds NaN or Inf")


@pytest.mark.core
def test_resuming_on_another_base_is_refused(tmp_path):
    other = Net()
    with torch.no_grad():
        other.body[3].weight.mul_(1.05)
    refused(checkpoint(tmp_path, "merged"), r"adapter: belongs to another base: values of 'body\.3\.weight'", other)


@pytest.mark.parametrize(
    ("kind", "trained", "options", "message"),
    [
        ("adapter", {}, {"lora_alpha": 3}, r"\blora_alpha was 8, now 3"),
        ("merged", {}, {"target_modules": ["body.0", "head"]}, r"'body\.3'.*target_modules was .*'body\.3'.*, now \("),
        ("full", {}, {"modules_to_save": ["body.1"], "bias": "lora_only"}, r"bias was 'none', now 'lora_only'"),
        (
            "adapter",
            {"modules_to_save": ["body.1"]},
            {"modules_to_save": None},
            r"'body\.1\.weight' was fully trained, but is frozen.* modules_to_save was \('body.1',\), now None",
        ),
    ],
)
def test_resuming_with_other_options_is_refused_by_name(
    tmp_path, kind: str, trained: dict[str, Any], options: dict[str, Any], message: str
):
    refused(checkpoint(tmp_path, kind, **trained), message, by_load=False, **options)


@pytest.mark.parametrize("take_over", [False, True])
def test_run_that_took_over_an_adapters_options_resumes(tmp_path, take_over: bool):
    inject(first := Net(), LoRAConfig(r=2, lora_alpha=8, target_modules=["body.0"]))
    save_adapter(first, tmp_path / "folder")
    load_adapter(model := Net(), tmp_path / "folder")
    trainer = fit_model(tmp_path, model, LoRACallback(), saved=tmp_path / "run.ckpt", max_epochs=1)
    again = Net()
    if take_over:
        load_adapter(again, tmp_path / "folder")
    trainer = make_trainer(tmp_path, LoRACallback(), max_epochs=2)
    trainer.fit(again, Data(), ckpt_path=tmp_path / "run.ckpt", **PLAIN_TYPES_ONLY)
    assert trainer.current_epoch == 2


def test_base_checkpoint_is_tested_and_starts_a_new_adapter(tmp_path):
    """A plain Lightning checkpoint of the base is where fine-tuning starts."""
    base = Net(seed=5)
    make_trainer(tmp_path).fit(base, Data(BATCHES))
    torch.save({"state_dict": base.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "base.ckpt")
    model = Net()
    make_trainer(tmp_path, lora()).test(
        model, Data(BATCHES), ckpt_path=tmp_path / "base.ckpt", **PLAIN_TYPES_ONLY, verbose=False
    )
    assert torch.equal(outputs(model), outputs(base))
    trained(tmp_path, model, lora())
    assert torch.equal(model.get_submodule(TARGETS[0]).weight, base.get_submodule(TARGETS[0]).weight)
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(base))


def test_fit_from_a_plain_checkpoint_is_refused_and_its_remedy_trains(tmp_path):
    fit_model(tmp_path, Net(), data=Data(BATCHES), saved=tmp_path / "plain.ckpt")
    with pytest.raises(LoRAError, match=r"holds no adapter.*leave ckpt_path out"):
        make_trainer(tmp_path, lora(), max_epochs=2).fit(
            Net(), Data(BATCHES), ckpt_path=tmp_path / "plain.ckpt", **PLAIN_TYPES_ONLY
        )
    model = Net.load_from_checkpoint(tmp_path / "plain.ckpt", **PLAIN_TYPES_ONLY)
    make_trainer(tmp_path, lora()).fit(model, Data(BATCHES))
    assert model.head.lora_B.any()


def test_fit_goes_on_from_a_plain_checkpoint_that_has_no_optimizers(tmp_path):
    """As a Trainer saves it that has only validated: it holds weights alone."""
    trainer = make_trainer(tmp_path)
    trainer.validate(base := Net(seed=2), Data(BATCHES), verbose=False)
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    assert torch.load(tmp_path / "base.ckpt", weights_only=True)["optimizer_states"] == []
    model = Net()
    make_trainer(tmp_path, lora()).fit(model, Data(BATCHES), ckpt_path=tmp_path / "base.ckpt", **PLAIN_TYPES_ONLY)
    assert torch.equal(model.head.weight, base.head.weight)
    assert model.head.lora_B.any()
