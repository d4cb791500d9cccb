"""Classes whose checkpoints leave a frozen part out, Lightning's documented pattern with strict_loading=False."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    load_from_checkpoint,
    merged,
    merged_state_dict,
)
from lightning_lora.exchange.checkpoint_of_model import check_complete
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.live_state import open_state
from support.covering import covering
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, outputs, weights
from support.runs.with_callback import lora

KINDS = ["adapter", "merged", "full"]
HEAD = {"head.weight", "head.bias"}
FACTORS = {"head.lora_A", "head.lora_B"}


class Partial(Net):
    """Leaves the body out, in one of three ways; its BatchNorm stays in eval mode, so that nothing in it changes."""

    keeps = "lora_"  # also under "body"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.strict_loading = False

    def on_train_epoch_start(self) -> None:
        self.body.eval()

    def kept(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in state.items() if name.startswith("head") or self.keeps in name}


class InStateDict(Partial):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.kept(super().state_dict(*args, **kwargs))


class InOnSaveCheckpoint(Partial):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.kept(checkpoint["state_dict"])


class Deletes(Partial):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in list(checkpoint["state_dict"].keys() - self.kept(checkpoint["state_dict"]).keys()):
            del checkpoint["state_dict"][name]


CLASSES = [InStateDict, InOnSaveCheckpoint, Deletes]


def fit(path: Path, model: Net, *, epochs: int, resume: Path | None = None, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    return fit_model(path, model, lora(**{"target_modules": ["head"]} | options), ckpt_path=resume, max_epochs=epochs)


each = pytest.mark.parametrize(("cls", "kind"), covering(CLASSES, KINDS, meet=1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
@each
def test_a_checkpoint_leaves_out_what_the_class_does_and_resumes_tests_and_loads(
    tmp_path, cls: type[Partial], kind: Any
):
    fit(tmp_path, model := cls(), epochs=1, save=kind).save_checkpoint(path := tmp_path / "part.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {"adapter": FACTORS, "merged": HEAD, "full": HEAD | FACTORS}[kind]
    assert kind != "merged" or checkpoint["lora"]["adapter"].keys() == FACTORS

    make_trainer(tmp_path, lora(target_modules=["head"])).test(found := cls(), Data(), ckpt_path=path, verbose=False)
    load_adapter(taken := cls(), path)
    for loaded in (found, taken, load_from_checkpoint(cls, path)):
        assert torch.equal(outputs(loaded), outputs(model))
    if kind == "merged":
        with merged(model):
            assert torch.equal(outputs(cls.load_from_checkpoint(path, **PLAIN_TYPES_ONLY)), outputs(model))

    fit(tmp_path, straight := cls(), epochs=2)
    fit(tmp_path, resumed := cls(), epochs=2, resume=path, save=kind)
    assert_same_tensors(weights(resumed), weights(straight))
    with pytest.raises(LoRAError, match=r"another base: values of 'body\.0\.weight'"):
        fit(tmp_path, cls(seed=2), epochs=2, resume=path)


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["nothing", "lora_"])
@pytest.mark.parametrize(("cls", "kind"), [(InStateDict, "full"), (Deletes, "adapter")])
def test_factors_that_the_class_leaves_out_are_saved_all_the_same(
    tmp_path, cls: type[Partial], kind: Any, keeps: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Partial, "keeps", keeps)
    options = {"target_modules": "all-linear"}
    fit(tmp_path, model := cls(), epochs=1, save=kind, **options).save_checkpoint(path := tmp_path / "part.ckpt")
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    assert {n for n in names if n.startswith("body")} == {f"body.{i}.lora_{leaf}" for i in (0, 3) for leaf in "AB"}
    assert torch.equal(outputs(load_from_checkpoint(cls, path)), outputs(model))
    fit(tmp_path, straight := cls(), epochs=2, **options)
    fit(tmp_path, resumed := cls(), epochs=2, resume=path, save=kind, **options)
    assert_same_tensors(weights(resumed), weights(straight))


@each
def test_a_trained_bias_that_the_class_leaves_out_is_saved_all_the_same(tmp_path, cls: type[Partial], kind: Any):
    trainer = fit(tmp_path, model := cls(), epochs=1, save=kind, bias="all")
    trainer.save_checkpoint(path := tmp_path / "part.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"].keys() >= {"body.0.bias", "body.3.bias"}
    load_adapter(loaded := cls(), path)
    for found in (loaded, load_from_checkpoint(cls, path)):
        assert torch.equal(found.body[3].bias, model.body[3].bias)
        assert torch.equal(outputs(found), outputs(model))


@pytest.mark.parametrize("cls", CLASSES)
def test_merged_weights_that_the_class_leaves_out_are_refused(tmp_path, cls: type[Partial]):
    """Without them a program would load the base, and never know of the adapter."""
    trainer = fit(tmp_path, model := cls(), epochs=1, save="merged", target_modules="all-linear")
    message = r"merged weights: .*leaves out 'body\.0\.weight', which is needed to merge an adapter.*exclude_modules"
    with pytest.raises(LoRAError, match=message):
        trainer.save_checkpoint(tmp_path / "lost.ckpt")
    if cls is InStateDict:
        with pytest.raises(LoRAError, match=message):
            merged_state_dict(model)


@pytest.mark.parametrize(
    ("left_out", "added", "said"),
    [
        ("head.lora_A", "", "'head.lora_A' is missing (1 missing, 0 unexpected)"),
        ("head.weight", "", "'head.weight' is missing (1 missing, 0 unexpected)"),
        ("", "tail.weight", "'tail.weight' has no place in the model (0 missing, 1 unexpected)"),
    ],
)
def test_names_of_a_sharded_checkpoint_by_another_program_have_to_be_complete(left_out: str, added: str, said: str):
    inject(model := Net(), LoRAConfig(r=2, target_modules=["head"]))
    handle = open_model(model, "test")
    base, adapter = set(handle.base_keys()), set(open_state(handle).changing)
    for names in (base, adapter, base | adapter):
        check_complete(handle, names, Path("a.ckpt"))
    with pytest.raises(LoRAError, match=re.escape(said)):
        check_complete(handle, (base | adapter | {added}) - {left_out, ""}, Path("a.ckpt"))
