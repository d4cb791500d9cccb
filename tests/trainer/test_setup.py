"""A Trainer's run: layers that are built late, backbones put into eval mode late, optimizers, averaging."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora import LoRAError, disable_adapter, unload
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.models.networks import fingerprint
from support.runs.training import (
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    RebuiltInSetup,
    assert_same_tensors,
    fit_model,
    make_trainer,
    outputs,
    seen,
    weights,
)
from support.runs.with_callback import BATCHES, lora, trained

# --- first values of what setup and configure_model build ---


class BuiltInBoth(Net):
    def prepare(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        if not hasattr(self, "head"):
            self.build_head()

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            self.build_body()


class BuiltInSetupByKeyword(Net):
    """Lightning passes stage by its name, and so the method may ask for that."""

    def prepare(self) -> None:
        self.build_body()

    def setup(self, *, stage: str) -> None:
        self.stages = [*getattr(self, "stages", []), stage]
        if not hasattr(self, "head"):
            self.build_head()


class FilledInConfigureModel(Net):
    """Its tensors are on the meta device until then."""

    def prepare(self) -> None:
        with torch.device("meta"):
            super().prepare()

    def configure_model(self) -> None:
        if self.head.weight.is_meta:
            self.to_empty(device="cpu")
            self.load_state_dict(Net().state_dict())


class RefilledInConfigureModel(Net):
    """Starts from other values, which are written over, as by a program's own initialisation."""

    def __init__(self) -> None:
        super().__init__(seed=2)

    def configure_model(self) -> None:
        if self.hparams["seed"] == 2:
            self.hparams["seed"] = 1
            with torch.no_grad():
                for name, value in Net().named_parameters():
                    self.get_parameter(name).copy_(value)


BUILDERS = [
    Net,
    BuiltInSetup,
    RebuiltInSetup,
    BuiltInConfigureModel,
    BuiltInBoth,
    FilledInConfigureModel,
    RefilledInConfigureModel,
]
BIASES = {"body.0.bias", "body.1.bias", "body.3.bias", "head.bias"}
BUFFERS = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}


def test_a_setup_that_takes_stage_by_its_name_gets_it_so(tmp_path):
    model = BuiltInSetupByKeyword()
    trainer = fit_model(tmp_path, model, lora())
    trainer.test(model, Data(), verbose=False)
    assert model.stages == ["fit", "test"]
    assert model.head.lora_B.abs().sum() > 0


TRAINED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "biases and norm": ({"bias": "all", "modules_to_save": ["body.1"]}, {*BIASES, "body.1.weight"}),
    "head and layer": (
        {"target_modules": ["0"], "modules_to_save": ["head", "3"]},
        {"head.weight", "head.bias", "body.3.weight"},
    ),
}


@pytest.mark.parametrize(("more", "builder"), covering([*TRAINED], BUILDERS, meet=1))
def test_disable_adapter_and_unload_after_fits_give_a_fresh_model_wherever_its_layers_were_built(
    tmp_path, builder: type[Net], more: str
):
    model, fresh, (options, trains) = builder(), Net(), TRAINED[more]
    for _ in range(2):  # setup and configure_model are called again in the second run
        trained(tmp_path, model, lora(**options))
    plain, after = weights(fresh), weights(model)
    assert {name for name in plain if not torch.equal(after[name], plain[name])} >= trains | BUFFERS
    with disable_adapter(model):
        found = seen(model)
        assert_same_tensors({name: found[name].detach() for name in plain}, plain)
        assert torch.equal(outputs(model), outputs(fresh))
    assert_same_tensors(weights(model), after)
    unload(model)
    assert_same_tensors(weights(model), plain)
    assert torch.equal(outputs(model), outputs(fresh))


class HeadBuiltAnew(Net):
    """Another head at each call of a method, with values of its own."""

    def prepare(self) -> None:
        self.build_body()
        self.heads: list[dict[str, torch.Tensor]] = []

    def build_head(self) -> None:
        self.hparams["seed"] += 1
        super().build_head()
        self.heads.append(weights(self.head))


class HeadAnewInSetup(HeadBuiltAnew):
    def setup(self, stage: str) -> None:
        self.build_head()


class HeadAnewInConfigureModel(HeadBuiltAnew):
    """Twice in each stage, as with weight averaging."""

    def setup(self, stage: str) -> None:
        self.configure_model()

    def configure_model(self) -> None:
        self.build_head()


@pytest.mark.parametrize("builder", [HeadAnewInSetup, HeadAnewInConfigureModel])
def test_a_module_that_is_built_anew_goes_back_to_its_own_first_values(tmp_path, builder: type[HeadBuiltAnew]):
    frozen, model = builder(), builder()
    for _ in range(2):
        trained(tmp_path, frozen, lora(target_modules=["body.0"]))
        assert_same_tensors(weights(frozen.head), frozen.heads[-1])
        assert not any(p.requires_grad for p in frozen.head.parameters())
        trained(tmp_path, model, lora(target_modules=["body.0"], modules_to_save=["head"]))
        assert not torch.equal(model.head.weight, model.heads[-1]["weight"])
        with disable_adapter(model):
            assert_same_tensors({name: t.detach() for name, t in seen(model.head).items()}, model.heads[-1])


# --- a backbone that is put into eval mode while the run goes on ---


class Listening(Net):
    """Notes in which epoch and step two passes of one input differ, which is where dropout acts."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: list[tuple[int, str, bool, bool]] = []

    def look(self, x: torch.Tensor) -> None:
        random = not torch.equal(self.body(x), self.body(x))
        self.noise.append((self.current_epoch, str(self._current_fx_name), self.body.training, random))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.look(batch[0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look(batch[0])
        with torch.enable_grad():
            self.look(batch[0])
        super().validation_step(batch, batch_idx)


class PutsIntoEval(L.Callback):
    """The body, from epoch 1 on."""


def put(self: Any, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
    if trainer.current_epoch >= 1:
        pl_module.body.eval()


@pytest.mark.parametrize(
    ("merged_eval", "hook", "first"),
    covering([True, False], ["on_train_epoch_start", "on_train_epoch_end"], [True, False]),
)
def test_adapters_of_a_backbone_in_eval_mode_from_epoch_1_on_drop_in_training_batches_alone(
    tmp_path, monkeypatch, merged_eval: bool, hook: str, first: bool
):
    monkeypatch.setattr(PutsIntoEval, hook, put)
    callbacks = [PutsIntoEval(), lora(lora_dropout=0.5, init_lora_weights=False, merged_eval=merged_eval)]
    model = Listening()
    make_trainer(tmp_path, *callbacks[:: 1 if first else -1], max_epochs=3).fit(model, Data())
    steps = [(epoch, mode, random) for epoch, step, mode, random in model.noise if step == "training_step"]
    start = 1 if hook == "on_train_epoch_start" else 2
    assert steps == [(epoch, epoch < start, True) for epoch in range(3) for _ in range(3)]
    evaluated = [random for _, step, _, random in model.noise if step == "validation_step"]
    assert evaluated == [False] * 18


# --- optimizers that hold a part of an adapter ---


class Holds(Net):
    """Its optimizer has every trainable parameter that `held` names."""

    held: Callable[[str], bool]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(
            [p for name, p in self.named_parameters() if p.requires_grad and self.held(name)], lr=0.1
        )


@pytest.mark.parametrize("missing", ["body.0.lora_A", "head.lora_B"])
def test_an_optimizer_that_holds_all_but_one_factor_is_refused_by_the_factors_name(tmp_path, missing: str):
    model = Holds()
    model.held = lambda name: name != missing
    with pytest.raises(LoRAError, match=rf"no optimizer holds the adapter parameter '{missing}'"):
        make_trainer(tmp_path, lora()).fit(model, Data())


def test_an_optimizer_of_one_part_is_refused_with_the_layers_to_exclude(tmp_path):
    model = Holds()
    model.held = lambda name: name.startswith("head")
    message = r"\(4 of 6 are in none\).*exclude_modules=\['body\.0', 'body\.3'\], or name those in target_modules"
    with pytest.raises(LoRAError, match=message) as caught:
        make_trainer(tmp_path, lora()).fit(model, Data())
    (exclude,) = re.findall(r"exclude_modules=(\[.*?\])", str(caught.value))
    before = weights(model := Holds())
    model.held = lambda name: name.startswith("head")
    callback = lora(target_modules="all-linear", exclude_modules=ast.literal_eval(exclude))
    make_trainer(tmp_path, callback).fit(model, Data())
    assert model.state_dict().keys() - before.keys() == {"head.lora_A", "head.lora_B"}


def test_a_base_that_setup_builds_anew_has_its_own_fingerprint_in_the_next_fit(tmp_path):
    callback = lora()
    make_trainer(tmp_path, callback).fit(model := RebuiltInSetup(), Data(BATCHES))
    first = open_model(model, "test").fingerprint()
    assert first == fingerprint(model)
    model.hparams["seed"] += 1
    make_trainer(tmp_path, callback).fit(model, Data(BATCHES))
    assert open_model(model, "test").fingerprint() == fingerprint(model) != first


class WithoutOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


def test_a_fit_without_an_optimizer_is_warned_of_by_lightning_alone(tmp_path):
    model = WithoutOptimizer()
    with pytest.warns(UserWarning, match="no optimizer") as caught:
        make_trainer(tmp_path, lora(), enable_checkpointing=True).fit(model, Data())
    about_optimizers = [str(warning.message) for warning in caught if "ptimizer" in str(warning.message)]
    assert about_optimizers == [
        "`LightningModule.configure_optimizers` returned `None`, this fit will run with no optimizer"
    ]
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("lora_B"))
