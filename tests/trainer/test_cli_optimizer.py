"""--optimizer and --lr_scheduler: LightningCLI builds both before there is an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.optim import Optimizer

from lightning_lora import LoRACallback, LoRACLI, unload
from lightning_lora.nn.adapted_module import adapted_layers
from support.runs.training import BuiltInSetup, Data, Net, assert_same_tensors, fit_model, make_trainer
from support.runs.with_callback import BATCHES, TARGETS

pytestmark = pytest.mark.usefixtures("as_program")

LORA: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "seed": 3}
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "LBFGS": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 2}),  # keeps the list of its parameters
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "none": {},
    "StepLR": {"step_size": 1, "gamma": 0.5},
    "LinearLR": {"start_factor": 0.1, "total_iters": 3},  # changes the rate at once
    "ReduceLROnPlateau": {"monitor": "val_loss", "patience": 0, "threshold": 10.0},
}


class NoOptimizer(Net):
    """Leaves the optimizer to the command line."""

    configure_optimizers = L.LightningModule.configure_optimizers


class HeadInSetup(NoOptimizer, BuiltInSetup):
    pass


class HeadInConfigureModel(HeadInSetup):
    setup = L.LightningModule.setup

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.build_head()


def from_command_line(
    path: Path, optimizer: str, scheduler: str, cli: type, model: type[Net] = NoOptimizer, **lora: Any
) -> LightningCLI:
    """What a program makes of its arguments: the model with its optimizer, and a Trainer that saves each epoch."""
    given: dict[str, Any] = {"class_path": "lightning_lora.LoRACallback", "init_args": LORA | lora}
    arguments: dict[str, Any] = {"lora": given["init_args"]} if issubclass(cli, LoRACLI) else {}
    callbacks = [] if issubclass(cli, LoRACLI) else [given]
    made, options = OPTIMIZERS[optimizer]
    arguments["optimizer"] = {"class_path": f"{made.__module__}.{made.__name__}", "init_args": options}
    if SCHEDULERS[scheduler]:
        owner = "lightning.pytorch.cli" if scheduler == "ReduceLROnPlateau" else "torch.optim.lr_scheduler"
        arguments["lr_scheduler"] = {"class_path": f"{owner}.{scheduler}", "init_args": SCHEDULERS[scheduler]}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    arguments["trainer"] = {"callbacks": callbacks, "max_epochs": 4, "num_sanity_val_steps": 0, **quiet}
    program: dict[str, Any] = {"run": False, "save_config_callback": None, "seed_everything_default": 1}
    return cli(model, Data, args=arguments, trainer_defaults={"callbacks": every_epoch(path)}, **program)


def every_epoch(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{epoch}", save_top_k=-1, enable_version_counter=False)


def with_own_method(optimizer: str, scheduler: str, model: type[Net] = NoOptimizer) -> Net:
    """The same model that makes the same optimizer and scheduler in configure_optimizers."""

    def configure_optimizers(self: Net) -> Any:
        cls, given = OPTIMIZERS[optimizer]
        made = cls(self.parameters(), **given)
        if not SCHEDULERS[scheduler]:
            return made
        options = dict(SCHEDULERS[scheduler])
        monitor = options.pop("monitor", None)
        schedule = getattr(torch.optim.lr_scheduler, scheduler)(made, **options)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "monitor": monitor}}

    return type("Configured", (model,), {"configure_optimizers": configure_optimizers})()


def state(trainer: L.Trainer) -> dict[str, Any]:
    return {
        "model": trainer.lightning_module.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "rate": [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs],
    }


BUILT_LATE = {"modules_to_save": ["body.1"]}
CASES = [
    (LoRACLI, "LBFGS", "none", NoOptimizer, {}),
    (LightningCLI, "AdamW", "LinearLR", NoOptimizer, {}),
    (LoRACLI, "AdamW", "ReduceLROnPlateau", NoOptimizer, {}),
    (LightningCLI, "SGD", "StepLR", HeadInSetup, BUILT_LATE),
    (LoRACLI, "SGD", "StepLR", HeadInConfigureModel, BUILT_LATE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cli", "optimizer", "scheduler", "model", "lora"), CASES)
def test_run_equals_that_of_the_same_optimizer_made_in_configure_optimizers(
    tmp_path, optimizer: str, scheduler: str, model: type[Net], lora: dict[str, Any], cli: type
):
    found = from_command_line(tmp_path, optimizer, scheduler, cli, model, **lora)
    found.trainer.fit(found.model, Data(BATCHES))
    expected = make_trainer(tmp_path, LoRACallback(**LORA | lora), max_epochs=4)
    expected.fit(with_own_method(optimizer, scheduler, model), Data(BATCHES))
    assert found.model.head.lora_B.abs().sum() > 0
    assert_same_tensors(state(found.trainer), state(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cli", "optimizer", "scheduler"), [(LoRACLI, "AdamW", "StepLR"), (LightningCLI, "SGD", "LinearLR")]
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, cli: type, optimizer: str, scheduler: str):
    whole = from_command_line(tmp_path, optimizer, scheduler, cli, HeadInSetup)
    whole.trainer.fit(whole.model, Data(BATCHES))
    resumed = from_command_line(tmp_path, optimizer, scheduler, cli, HeadInSetup)
    resumed.trainer.fit(resumed.model, Data(BATCHES), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert resumed.trainer.optimizers[0].state
    assert_same_tensors(state(resumed.trainer), state(whole.trainer))


@pytest.mark.slow
@pytest.mark.parametrize("cli", [LoRACLI, LightningCLI])
def test_fit_with_names_on_the_command_line_trains_the_adapter(cli: type):
    ours = ["--lora.r=2"] if cli is LoRACLI else ["--trainer.callbacks=lightning_lora.LoRACallback"]
    quiet = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", *(f"--trainer.{name}=false" for name in quiet)]
    # Not AdamW, of which bitsandbytes has one too where it is imported.
    chosen = ["--optimizer=NAdam", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val_loss"]
    arguments = ["fit", "--seed_everything=1", *trainer, *ours, *chosen]
    run = cli(NoOptimizer, Data, args=arguments, save_config_callback=None)
    assert all(layer.lora_B.abs().sum() > 0 for layer in adapted_layers(run.model).values())


def test_optimizer_goes_on_with_its_state_in_a_second_fit(tmp_path):
    program = from_command_line(tmp_path, "AdamW", "none", LoRACLI)
    program.trainer.fit(program.model, Data(BATCHES))
    again = fit_model(tmp_path, program.model, LoRACallback(), data=Data(BATCHES), max_epochs=1)
    steps = {parameter: state["step"] for parameter, state in again.optimizers[0].state.items()}
    assert steps == {p: (4 + 1) * BATCHES for p in program.model.parameters() if p.requires_grad}


class NewHeadInSetup(HeadInSetup):
    def setup(self, stage: str) -> None:
        self.build_head()


def test_optimizer_forgets_parameters_that_a_second_fit_builds_anew(tmp_path):
    program = from_command_line(tmp_path, "AdamW", "none", LoRACLI, NewHeadInSetup)
    program.trainer.fit(program.model, Data(BATCHES))
    again = fit_model(tmp_path, program.model, LoRACallback(), data=Data(BATCHES), max_epochs=2)
    assert set(again.optimizers[0].state) == {p for p in program.model.parameters() if p.requires_grad}
    assert program.model.head.lora_B.abs().sum() > 0


class FasterB(LoRACLI):
    """Puts every B into a group of its own, as LoRA+ does."""

    @staticmethod
    def configure_optimizers(lightning_module: Any, optimizer: Optimizer, lr_scheduler: Any = None) -> Any:
        faster = [layer.lora_B for layer in adapted_layers(lightning_module).values()]
        first = optimizer.param_groups[0]["params"]
        if len(optimizer.param_groups) == 1:
            first[:] = set(first) - set(faster)
            optimizer.add_param_group({"params": faster, "lr": 0.2})
        return optimizer


@pytest.mark.slow
def test_groups_that_the_program_makes_of_the_parameters_stay_in_a_second_fit(tmp_path):
    program = from_command_line(tmp_path, "AdamW", "none", FasterB)
    program.trainer.fit(program.model, Data(BATCHES))
    make_trainer(tmp_path, LoRACallback()).fit(program.model, Data(BATCHES))
    groups = [group["params"] for group in program.trainer.optimizers[0].param_groups]
    assert groups[1] == [layer.lora_B for layer in adapted_layers(program.model).values()]
    assert sorted(map(id, groups[0] + groups[1])) == sorted(map(id, program.model.parameters()))


def test_unload_gives_back_the_method_that_the_program_attached(tmp_path):
    program = from_command_line(tmp_path, "AdamW", "none", LoRACLI)
    attached = vars(program.model)["configure_optimizers"]
    program.trainer.fit(program.model, Data(BATCHES))
    assert vars(program.model)["configure_optimizers"] is not attached
    unload(program.model)
    assert vars(program.model)["configure_optimizers"] is attached
