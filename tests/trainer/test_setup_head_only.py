"""A Trainer's life without layers, by target_modules=[]: in YAML, evaluations, resuming, what a finished fit leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import (
    LoRACallback,
    LoRACLI,
    LoRAConfig,
    LoRAError,
    LoRAMonitor,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    summary,
    take_adapter,
)
from support.runs.training import Data, Net, make_trainer, outputs

HEAD = ["head.weight", "head.bias"]


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(target_modules=[], modules_to_save=["head"], **options)


class Watched(Net):
    """Notes whether an evaluation is merged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(is_merged(self))
        return super().forward(x)


class Late(Net):
    """Builds its head in configure_model."""

    def prepare(self) -> None:
        self.build_body()

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.build_head()


@pytest.mark.parametrize(("build", "save"), [(Watched, "adapter"), (Late, "merged"), (Watched, "full")])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path, build: type[Net], save: str):
    whole = build()
    make_trainer(tmp_path, lora(save=save), max_epochs=2).fit(whole, Data())
    trainer, path = make_trainer(tmp_path, lora(save=save)), tmp_path / "half.ckpt"
    trainer.fit(first := build(), Data())
    trainer.save_checkpoint(path)
    if save == "adapter":
        buffers = [f"body.1.{name}" for name, _ in first.body[1].named_buffers()]
        assert sorted(torch.load(path, weights_only=True)["state_dict"]) == sorted([*HEAD, *buffers])
    second = build()
    make_trainer(tmp_path, LoRACallback(save=save), max_epochs=2).fit(second, Data(), ckpt_path=path)
    assert not any(first.seen + second.seen)
    trained = [name for name, parameter in second.named_parameters() if parameter.requires_grad]
    assert trained == HEAD
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    tested = build()
    make_trainer(tmp_path, LoRACallback()).test(tested, Data(), ckpt_path=path, verbose=False)
    assert torch.equal(outputs(tested), outputs(first))


def test_a_head_is_trained_and_resumed_on_a_frozen_adapter(tmp_path: Path):
    inject(other := Net(), LoRAConfig(r=2, target_modules=["body.0"], init_lora_weights=False), seed=1)
    options: dict[str, Any] = {"attach": {"sft": take_adapter(other)}}
    whole = Net()
    make_trainer(tmp_path, lora(**options), max_epochs=2).fit(whole, Data())
    trainer, path = make_trainer(tmp_path, lora(**options)), tmp_path / "half.ckpt"
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(path)
    second = Net()
    make_trainer(tmp_path, lora(**options), max_epochs=2).fit(second, Data(), ckpt_path=path)
    assert torch.equal(outputs(second), outputs(whole))
    assert not torch.allclose(outputs(second), outputs(Net()))
    with disable_adapter(second):
        assert torch.equal(second.head.weight, Net().head.weight)


def test_the_fit_says_that_nothing_is_adapted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "lightning_lora")
    monitor = LoRAMonitor(every_n_steps=1, plots=False)  # which logs nothing
    make_trainer(tmp_path, lora(), monitor, logger=CSVLogger(tmp_path)).fit(model := Net(), Data())
    assert "No adapter (target_modules=[])" in caplog.text
    assert summary(model).save == "adapter"
    assert 'what is trained (save="adapter")' in str(summary(model))


class Restarted(Net):
    """Goes back to the head of the fit's beginning in the second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 0:
            self.first = take_adapter(self)
        load_adapter(self, self.first)
        self.loaded = self.head.weight.detach().clone()


def test_a_head_is_loaded_inside_a_fit(tmp_path: Path):
    make_trainer(tmp_path, lora(), max_epochs=2).fit(model := Restarted(), Data())
    assert torch.equal(model.loaded, model.first.tensors["head.weight"])
    assert not torch.equal(model.loaded, model.head.weight)


def test_merge_after_fit_leaves_the_trained_model(tmp_path: Path):
    make_trainer(tmp_path, lora(merge_after_fit=True)).fit(model := Net(), Data())
    make_trainer(tmp_path, lora()).fit(other := Net(), Data())
    assert torch.equal(outputs(model), outputs(other))
    with pytest.raises(LoRAError, match="was not injected"):
        summary(model)


def test_nothing_to_train_is_refused_in_setup(tmp_path: Path):
    with pytest.raises(LoRAError, match=r"target_modules: \[\] adapts no layer, and nothing else is trained"):
        make_trainer(tmp_path, LoRACallback(target_modules=[])).fit(Net(), Data())


@pytest.mark.usefixtures("as_program")
def test_the_block_of_yaml_takes_an_empty_list(tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text("lora:\n  target_modules: []\n  modules_to_save: [head]\n")
    arguments = ["--config", str(config), "--trainer.accelerator=cpu"]
    cli = LoRACLI(Net, Data, args=arguments, run=False, save_config_callback=None, seed_everything_default=1)
    callback = next(each for each in cli.trainer.callbacks if isinstance(each, LoRACallback))
    assert (callback.config.target_modules, callback.config.modules_to_save) == ((), ("head",))
