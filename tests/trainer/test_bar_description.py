"""Lightning's progress bar says when an evaluation runs merged, and is restored."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_lora import LoRACallback, is_merged
from support.quantised import layer_of_bitsandbytes
from support.runs import At, lora_with_effect
from support.training import Data, Net, make_trainer


def shown(bar: ProgressBar) -> str:
    """Return what the screen calls the evaluation that runs."""
    if isinstance(bar, TQDMProgressBar):
        return bar._val_progress_bar.desc if bar._val_progress_bar is not None else bar._test_progress_bar.desc
    return bar.progress.tasks[-1].description


def bar_in(path: Path, callback: LoRACallback, bar: ProgressBar, stage: str, first: bool = True) -> list[str]:
    """Run one stage of a Trainer; returns what the bar says after the first batch."""
    seen: list[str] = []
    note = At(f"on_{stage}_batch_end", lambda trainer, module: seen.append(shown(bar)))
    callbacks: tuple[L.Callback, ...] = (callback, bar) if first else (bar, callback)
    trainer = make_trainer(path, *callbacks, note, enable_progress_bar=True, max_epochs=1)
    (trainer.fit if stage == "validation" else trainer.test)(Net(), Data())
    return seen


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("stage", ["validation", "test"])
@pytest.mark.parametrize("make", [TQDMProgressBar, RichProgressBar])
def test_bar_says_merged_and_keeps_its_class(tmp_path, make: type[ProgressBar], stage: str, first: bool):
    bar = make()
    seen = bar_in(tmp_path, lora_with_effect(), bar, stage, first)
    assert seen
    assert all(f"{'Validation' if stage == 'validation' else 'Testing'}, merged" in text for text in seen)
    assert type(bar) is make
    assert bar.validation_description == "Validation"


def test_bar_of_an_evaluation_with_factors_says_nothing_more(tmp_path):
    assert not [
        text
        for text in bar_in(tmp_path, lora_with_effect(merged_eval=False), TQDMProgressBar(), "test")
        if "merged" in text
    ]


class PartlyQuantised(Net):
    """Its first layer, or all of them, in 4 bits."""

    which: tuple[str, ...] = ("body.0",)

    def prepare(self) -> None:
        super().prepare()
        for name in self.which:
            parent, _, child = name.rpartition(".")
            linear = self.get_submodule(name)
            setattr(self.get_submodule(parent), child, layer_of_bitsandbytes(linear, "nf4").to("cpu"))


class Quantised(PartlyQuantised):
    which = ("body.0", "body.3", "head")


@pytest.mark.parametrize(("model", "said"), [(PartlyQuantised, "Testing, partly merged"), (Quantised, "Testing")])
@pytest.mark.parametrize("make", [TQDMProgressBar, RichProgressBar])
def test_bar_does_not_call_merged_what_stays_factored(tmp_path, make: type[ProgressBar], model: type[Net], said: str):
    bar, seen = make(), []
    note = At("on_test_batch_end", lambda trainer, module: seen.append((shown(bar), is_merged(module))))
    make_trainer(tmp_path, lora_with_effect(), bar, note, enable_progress_bar=True).test(model(), Data(), verbose=False)
    assert seen
    assert {text.rstrip(": ").replace(" DataLoader 0", "") for text, _ in seen} == {said}
    assert all(merged for _, merged in seen)  # merge was called
    assert type(bar) is make


class Own(ABC, TQDMProgressBar):
    @property
    def validation_description(self) -> str:
        return "Checking"


def test_description_of_ones_own_is_kept(tmp_path):
    seen = bar_in(tmp_path, lora_with_effect(), bar := Own(), "validation")
    assert all(text.startswith("Checking, merged") for text in seen)
    assert bar.validation_description == "Checking"


def test_bar_has_its_class_again_after_an_exception(tmp_path):
    def stop(trainer: Any, module: Any) -> None:
        assert bar.validation_description == "Validation, merged"
        raise RuntimeError("stop")

    bar = TQDMProgressBar()
    trainer = make_trainer(
        tmp_path, lora_with_effect(), bar, At("on_validation_batch_end", stop), enable_progress_bar=True
    )
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Net(), Data())
    assert type(bar) is TQDMProgressBar


@pytest.mark.filterwarnings("ignore:LoRACallback. this validation runs unmerged")
def test_validation_that_cannot_merge_is_not_called_merged(tmp_path):
    def break_b(trainer: Any, module: Any) -> None:
        module.body[3].lora_B.data[0].fill_(torch.nan)

    bar, seen = TQDMProgressBar(), []
    callbacks = [At("on_validation_start", break_b), lora_with_effect(), bar]
    note = At("on_validation_batch_end", lambda trainer, module: seen.append(shown(bar)))
    make_trainer(tmp_path, *callbacks, note, enable_progress_bar=True).fit(Net(), Data())
    assert seen
    assert not [text for text in seen if "merged" in text]
