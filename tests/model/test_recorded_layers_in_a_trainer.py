"""Adapted layers that a precision plugin or a hook replaces after injection: an error names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightning_lora import LoRAError
from support.covering import covering
from support.runs.training import Data, Net, make_trainer
from support.runs.with_callback import At, lora


class Converted(nn.Module):
    """What a plugin makes of a linear layer: the same numbers, a class of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Converts(Precision):
    """Replaces linear layers when the strategy is set up, as the plugins of bitsandbytes and transformer-engine do."""

    def __init__(self, *kept: str) -> None:
        self.kept = kept

    def convert_module(self, module: nn.Module) -> nn.Module:
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.Linear) and name not in self.kept:
                replace(module, name)
        return module


def replace(model: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Converted(model.get_submodule(name)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kept", "merged_eval", "save"),
    covering([(), ("body.0", "head")], [True, False], ["adapter", "merged", "full"], meet=1),
)
def test_layers_that_a_precision_plugin_replaces_are_named_at_fit_start(
    tmp_path, kept: tuple[str, ...], merged_eval: bool, save: Any
):
    trainer = make_trainer(tmp_path, lora(merged_eval=merged_eval, save=save), plugins=Converts(*kept))
    gone = "body.3" if kept else "body.0"
    counted = "1 of 3" if kept else "3 of 3"
    message = (
        rf"LoRACallback: '{gone}' in Net was adapted, but is now a .*Converted without an "
        rf"adapter \({counted} adapted layers are gone\).*exclude_modules=\['{gone}'"
    )
    with pytest.raises(LoRAError, match=message):
        trainer.fit(Net(), Data())


@pytest.mark.parametrize(("stage", "merged_eval"), covering(["validate", "test", "predict"], [True, False], meet=1))
def test_layers_that_a_precision_plugin_replaces_are_named_before_an_evaluation(
    tmp_path, stage: str, merged_eval: bool
):
    trainer = make_trainer(tmp_path, lora(merged_eval=merged_eval), plugins=Converts("body.0"))
    with pytest.raises(LoRAError, match=r"LoRACallback: 'body\.3' in .*Net was adapted, but is now a .*Converted"):
        getattr(trainer, stage)(Net(), Data())


HOOKS = ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_epoch_end"]


@pytest.mark.parametrize(
    ("hook", "first", "save"), covering(HOOKS, [True, False], ["adapter", "merged", "full"], meet=1)
)
def test_a_layer_that_a_hook_replaces_is_named_at_the_latest_when_it_is_saved(
    tmp_path, hook: str, first: bool, save: Any
):
    replacing = At(hook, lambda trainer, pl_module: replace(pl_module, "body.3"))
    callbacks = [replacing, lora(merged_eval=False, save=save)][:: 1 if first else -1]
    trainer = make_trainer(tmp_path, *callbacks, limit_val_batches=0)

    def run() -> None:
        trainer.fit(Net(), Data())
        trainer.save_checkpoint(tmp_path / "lost.ckpt")

    with pytest.raises(LoRAError, match=r"'body\.3' in .*Net was adapted, but is now a .*Converted .*1 of 3"):
        run()
    assert not (tmp_path / "lost.ckpt").exists()


def test_a_layer_that_is_taken_out_between_two_fits_is_named(tmp_path):
    def fit() -> None:
        make_trainer(tmp_path, lora(target_modules="all-linear")).fit(model, Data())

    model = Net()
    fit()
    model.body[3] = nn.ReLU()
    with pytest.raises(LoRAError, match=r"LoRACallback: 'body\.3' in Net was adapted, but is now a torch\.nn.*\.ReLU"):
        fit()
    del model.body[3:]
    with pytest.raises(LoRAError, match=r"LoRACallback: 'body\.3' in Net was adapted, but is no longer there"):
        fit()
