"""--optimizer and --lr_scheduler: LightningCLI builds both before there is an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.optim import Optimizer

from lightning_lora import LoRACallback, LoRACLI, LoRAError, inject, lora_param_groups, unload
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.param_groups import LR_EMBEDDING
from lightning_lora.nn.adapted_weights import adapted_layers
from lightning_lora.trainer.cli_optimizer import _split_groups_
from support.models import Zoo, zoo_config
from support.runs import BATCHES, TARGETS
from support.training import Data, Net, assert_same_tensors, make_trainer


class Eager(torch.optim.SGD):
    """Makes the state of its parameters in __init__, as Adagrad of torch 2.6 does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.state.update({parameter: {"steps": 0} for parameter in self.param_groups[0]["params"]})

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["steps"] += parameter.requires_grad
        return super().step(closure)


LORA: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "seed": 3}
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "LBFGS": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 2}),  # keeps the list of its parameters
    "Eager": (Eager, {"lr": 0.2}),
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


class HeadInSetup(NoOptimizer):
    def prepare(self) -> None:
        self.build_body()

    def setup(self, stage: str) -> None:
        if not hasattr(self, "head"):
            self.build_head()


class HeadInConfigureModel(HeadInSetup):
    setup = L.LightningModule.setup

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.build_head()


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """LightningCLI warns where a program's own arguments would be passed over."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.chdir(tmp_path)


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


CASES = [(optimizer, "none", NoOptimizer, {}) for optimizer in OPTIMIZERS]
CASES += [("AdamW", scheduler, NoOptimizer, {}) for scheduler in SCHEDULERS]
CASES += [("SGD", "StepLR", model, {"modules_to_save": ["body.1"]}) for model in (HeadInSetup, HeadInConfigureModel)]


@pytest.mark.slow
@pytest.mark.parametrize("cli", [LoRACLI, LightningCLI])
@pytest.mark.parametrize(("optimizer", "scheduler", "model", "lora"), CASES)
def test_run_equals_that_of_the_same_optimizer_made_in_configure_optimizers(
    tmp_path, optimizer: str, scheduler: str, model: type[Net], lora: dict[str, Any], cli: type
):
    found = from_command_line(tmp_path, optimizer, scheduler, cli, model, **lora)
    found.trainer.fit(found.model, Data(BATCHES))
    expected = make_trainer(tmp_path, LoRACallback(**LORA | lora), max_epochs=4)
    expected.fit(with_own_method(optimizer, scheduler, model), Data(BATCHES))
    assert found.model.head.lora_B.abs().sum() > 0
    assert_same_tensors(state(found.trainer), state(expected))


@pytest.mark.parametrize(("optimizer", "scheduler"), [("AdamW", "StepLR"), ("Eager", "LinearLR")])
@pytest.mark.parametrize("cli", [LoRACLI, LightningCLI])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, cli: type, optimizer: str, scheduler: str):
    whole = from_command_line(tmp_path, optimizer, scheduler, cli, HeadInSetup)
    whole.trainer.fit(whole.model, Data(BATCHES))
    resumed = from_command_line(tmp_path, optimizer, scheduler, cli, HeadInSetup)
    resumed.trainer.fit(resumed.model, Data(BATCHES), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert resumed.trainer.optimizers[0].state
    assert_same_tensors(state(resumed.trainer), state(whole.trainer))


@pytest.mark.parametrize("cli", [LoRACLI, LightningCLI])
def test_resumed_run_equals_that_of_the_method_resumed_from_the_same_file(tmp_path, cli: type):
    """Lightning saves before ReduceLROnPlateau steps, so a resumed run is behind, without an adapter too."""
    program = from_command_line(tmp_path, "AdamW", "ReduceLROnPlateau", cli)
    program.trainer.fit(program.model, Data(BATCHES))
    resumed = from_command_line(tmp_path, "AdamW", "ReduceLROnPlateau", cli)
    expected = make_trainer(tmp_path, LoRACallback(**LORA), every_epoch(tmp_path), max_epochs=4)
    last = {"ckpt_path": str(tmp_path / "epoch=1.ckpt")}
    expected.fit(with_own_method("AdamW", "ReduceLROnPlateau"), Data(BATCHES), **last)
    resumed.trainer.fit(resumed.model, Data(BATCHES), **last)
    assert_same_tensors(state(resumed.trainer), state(expected))


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
    program = from_command_line(tmp_path, "Eager", "none", LoRACLI)
    program.trainer.fit(program.model, Data(BATCHES))
    again = make_trainer(tmp_path, LoRACallback(), max_epochs=1)
    again.fit(program.model, Data(BATCHES))
    steps = {parameter: state["steps"] for parameter, state in again.optimizers[0].state.items()}
    assert steps == {p: (4 + 1) * BATCHES if p.requires_grad else 0 for p in program.model.parameters()}


class NewHeadInSetup(HeadInSetup):
    def setup(self, stage: str) -> None:
        self.build_head()


def test_optimizer_forgets_parameters_that_a_second_fit_builds_anew(tmp_path):
    program = from_command_line(tmp_path, "AdamW", "none", LoRACLI, NewHeadInSetup)
    program.trainer.fit(program.model, Data(BATCHES))
    again = make_trainer(tmp_path, LoRACallback(), every_epoch(tmp_path), max_epochs=2)
    again.fit(program.model, Data(BATCHES))
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


# --- LoRA+ ---

RATIO, LR, DECAY = 8.0, 0.01, 0.1
PLUS: dict[str, Any] = {"target_modules": [*TARGETS, "body.3"], "modules_to_save": ["body.1"], "bias": "lora_only"}
OPTIMIZERS["decaying"] = (torch.optim.AdamW, {"lr": LR, "weight_decay": DECAY})


def halved(epoch: int) -> float:
    return 0.5**epoch


LR_SCHEDULERS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": halved},
    "MultiplicativeLR": {"lr_lambda": halved},
    "StepLR": {"step_size": 1},
    "MultiStepLR": {"milestones": [1, 2]},
    "ConstantLR": {"total_iters": 2},
    "LinearLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.5},
    "PolynomialLR": {"total_iters": 3},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 5},
    "ReduceLROnPlateau": {"monitor": "val_loss", "patience": 0, "threshold": 10.0},
}
SCHEDULERS.update(LR_SCHEDULERS)
OF_RATES = ("base_lr", "max_lr")  # arguments that may be a list, one for each group


def with_groups(scheduler: str, ratio: float = RATIO) -> Net:
    """The same model, with lora_param_groups in its configure_optimizers."""

    def configure_optimizers(self: Net) -> Any:
        groups = lora_param_groups(self, lr=LR, lr_ratio=ratio, weight_decay=DECAY)
        made = torch.optim.AdamW(groups)
        if scheduler == "none":
            return made
        options = dict(SCHEDULERS[scheduler])
        monitor = options.pop("monitor", None)
        for name in OF_RATES:
            if name in options:
                options[name] = [options[name] * group["lr"] / LR for group in groups]
        schedule = getattr(torch.optim.lr_scheduler, scheduler)(made, **options)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "monitor": monitor}}

    return type("WithGroups", (NoOptimizer,), {"configure_optimizers": configure_optimizers})()


def rates_by_parameter(trainer: L.Trainer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each trainable parameter."""
    names = {parameter: name for name, parameter in trainer.lightning_module.named_parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [(names[p], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"] if p.requires_grad]
    assert len(rates) == len(dict(rates))
    return dict(rates)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch'")
@pytest.mark.parametrize("scheduler", ["none", *LR_SCHEDULERS])
def test_run_with_lr_ratio_equals_that_of_lora_param_groups_with_each_scheduler(tmp_path, scheduler: str):
    found = from_command_line(tmp_path, "decaying", scheduler, LoRACLI, **PLUS, lr_ratio=RATIO)
    found.trainer.fit(found.model, Data(BATCHES))
    expected = make_trainer(tmp_path, LoRACallback(**LORA | PLUS), max_epochs=4)
    expected.fit(with_groups(scheduler), Data(BATCHES))
    rates = rates_by_parameter(found.trainer)
    assert {name: pytest.approx(rate) for name, rate in rates.items()} == rates_by_parameter(expected)
    assert rates["head.lora_B"][0] == pytest.approx(RATIO * rates["head.lora_A"][0])
    assert (rates["head.lora_A"][1], rates["body.0.bias"][1], rates["body.1.weight"][1]) == (DECAY, 0, 0)
    states = (trainer.lightning_module.state_dict() for trainer in (found.trainer, expected))
    for tensor, same in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(tensor, same)


@pytest.mark.parametrize("cli", [LoRACLI, LightningCLI])
def test_resumed_run_with_lr_ratio_equals_the_uninterrupted_one(tmp_path, cli: type):
    whole = from_command_line(tmp_path, "decaying", "LinearLR", cli, **PLUS, lr_ratio=RATIO)
    whole.trainer.fit(whole.model, Data(BATCHES))
    resumed = from_command_line(tmp_path, "decaying", "LinearLR", cli, **PLUS, lr_ratio=RATIO)
    resumed.trainer.fit(resumed.model, Data(BATCHES), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert_same_tensors(state(resumed.trainer), state(whole.trainer))
    assert rates_by_parameter(resumed.trainer) == rates_by_parameter(whole.trainer)


def test_groups_of_lr_ratio_stay_in_a_second_fit(tmp_path):
    program = from_command_line(tmp_path, "decaying", "none", LoRACLI, HeadInSetup, **PLUS, lr_ratio=RATIO)
    program.trainer.fit(program.model, Data(BATCHES))
    before = rates_by_parameter(program.trainer)
    again = make_trainer(tmp_path, LoRACallback(**LORA | PLUS, lr_ratio=RATIO))
    again.fit(program.model, Data(BATCHES))
    assert rates_by_parameter(again) == before


def test_groups_of_lr_ratio_have_names_for_the_monitor_of_learning_rates(tmp_path):
    program = from_command_line(tmp_path, "decaying", "none", LoRACLI, **PLUS, lr_ratio=RATIO)
    program.trainer.fit(program.model, Data(BATCHES))
    assert [g.get("name") for g in program.trainer.optimizers[0].param_groups] == [None, "lora_B", "no_decay"]


@pytest.mark.parametrize("lr", [0.02, 0.5])
def test_groups_of_lr_ratio_are_those_of_lora_param_groups_with_embeddings_at_their_own_rate(lr: float):
    inject(model := Zoo(), zoo_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=DECAY)
    _split_groups_(optimizer, None, open_model(model, "test"), RATIO)

    def rules(groups: Any) -> dict[Any, tuple[float, float]]:
        return {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"] if p.requires_grad}

    expected = rules(lora_param_groups(model, lr=lr, lr_ratio=RATIO, weight_decay=DECAY))
    assert rules(optimizer.param_groups) == {p: pytest.approx(rule) for p, rule in expected.items()}
    assert expected[model.embed.lora_B][0] == pytest.approx(LR_EMBEDDING)


def test_lr_ratio_beside_an_optimizer_of_the_models_own_is_refused_with_the_remedy(tmp_path):
    trainer = make_trainer(tmp_path, LoRACallback(**LORA, lr_ratio=16))
    with pytest.raises(
        LoRAError, match=r"lr_ratio=16 is for an optimizer .* lora_param_groups\(self, lr=..., lr_ratio=16"
    ):
        trainer.fit(Net(), Data(BATCHES))


def test_lr_ratio_means_nothing_to_an_evaluation(tmp_path):
    make_trainer(tmp_path, LoRACallback(**LORA, lr_ratio=16)).validate(Net(), Data(BATCHES), verbose=False)


def test_lr_ratio_with_an_optimizer_of_one_group_is_refused(tmp_path):
    program = from_command_line(tmp_path, "LBFGS", "none", LoRACLI, lr_ratio=16)
    with pytest.raises(LoRAError, match="lr_ratio=16: LBFGS has one learning rate"):
        program.trainer.fit(program.model, Data(BATCHES))


def test_lr_ratio_is_checked_where_it_is_given():
    with pytest.raises(LoRAError, match="LoRACallback: lr_ratio must be a number above 0, but it is -1"):
        LoRACallback(lr_ratio=-1)
