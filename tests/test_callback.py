"""LoRACallback's options, what it adopts and refuses, and what it says and checks at fit start."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merge_and_unload,
    summary,
    unload,
)
from lightning_lora.model.adapted_model import open_model
from lightning_lora.nn.lora_layer import LoRALayer
from support.runs.training import (
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    fit_model,
    make_trainer,
    outputs,
    weights,
)

TARGETS = ["body.0", "body.3", "head"]


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRALayer)]


def test_options_by_name_are_those_of_the_config_and_eight_of_its_own():
    whole, *ours = inspect.signature(LoRACallback).parameters.values()
    assert (whole.name, whole.kind) == ("config", inspect.Parameter.VAR_POSITIONAL)  # unseen by YAML and --help
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours)
    own = {
        "merged_eval": True,
        "save": "adapter",
        "seed": None,
        "attach": None,
        "merge_after_fit": False,
        "quantize": None,
        "dequantize": None,
        "verbose": True,
    }
    config = {field.name: field.default for field in fields(LoRAConfig)}
    assert {parameter.name: parameter.default for parameter in ours} == config | own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": "adapters"}, r"save must be one of adapter, merged, full, but it is 'adapters'"),
        ({"merged_eval": "no"}, r"merged_eval must be true or false, but it is 'no'"),
        ({"verbose": 1}, r"verbose must be true or false, but it is 1"),
    ],
)
def test_callback_with_a_wrong_own_option_is_refused_at_once(options: dict[str, Any], message: str):
    with pytest.raises(LoRAError, match=message):
        LoRACallback(**options)


PEFTS = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["body.0"], use_rslora=True)


@pytest.mark.parametrize("config", [LoRAConfig(r=2, target_modules=["body.0"]), PEFTS])
def test_callback_takes_a_config_of_either_package_instead_of_options(tmp_path, config: Any):
    callback = LoRACallback(config, save="full")
    assert callback.config == (config if isinstance(config, LoRAConfig) else LoRAConfig.from_peft(config))
    assert callback.save == "full"
    make_trainer(tmp_path, callback).fit(model := Net(), Data())
    assert adapted(model) == ["body.0"]
    assert model.body[0].lora_A.shape[0] == config.r


@pytest.mark.parametrize(
    ("configs", "options", "message"),
    [
        ([PEFTS], {"r": 4, "bias": "all"}, r"LoRACallback: r, bias given with a LoRAConfig"),
        ([peft.LoKrConfig(target_modules=["body.0"])], {}, "expected a peft.LoraConfig, found a LoKrConfig"),
        ([LoRAConfig(r=4)], {"r": 8}, r"LoRACallback: r given with a LoRAConfig"),
        ([LoRAConfig(), LoRAConfig()], {}, r"expected one LoRAConfig .*, found LoRAConfig, LoRAConfig"),
        ([{"r": 4}], {}, r"expected one LoRAConfig or options by their names, found dict"),
    ],
)
def test_callback_refuses_anything_but_one_config_or_options(configs, options, message: str):
    with pytest.raises(LoRAError, match=message):
        LoRACallback(*configs, **options)


@pytest.mark.core
@pytest.mark.parametrize("model_class", [Net, BuiltInSetup, BuiltInConfigureModel])
def test_adapts_and_trains_layers_wherever_they_are_built(tmp_path, model_class: type[Net]):
    model = model_class()
    base = weights(Net())
    make_trainer(tmp_path, LoRACallback(r=2, target_modules=TARGETS)).fit(model, Data())
    assert adapted(model) == TARGETS
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALayer):
            assert layer.lora_B.abs().sum() > 0
            assert torch.equal(layer.weight, base[f"{name}.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{factor}" for name in TARGETS for factor in ("lora_A", "lora_B")}
    assert not {"setup", "configure_model"} & vars(model).keys()  # they are the class's own again


@pytest.mark.core
@pytest.mark.parametrize("model_class", [Net, BuiltInConfigureModel])
def test_unmatched_targets_are_an_error_once_every_layer_is_there(tmp_path, model_class: type[Net]):
    model = model_class()
    callback = LoRACallback(target_modules=["haed"])
    with pytest.raises(LoRAError, match=r"target_modules: 'haed' names no layer to adapt; did you mean 'head'"):
        make_trainer(tmp_path, callback).fit(model, Data())
    assert hasattr(model, "head"), "judged too early"
    assert adapted(model) == []
    assert not [name for name in vars(model) if name.startswith("lora") or name in L.LightningModule.__dict__]
    assert all(parameter.requires_grad for parameter in model.parameters())


class InjectsInConfigureModel(BuiltInConfigureModel):
    """Builds, injects, then does what a user who shards does: looks for the adapters to shard them too."""

    part = ""

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            super().configure_model()
            inject(self.get_submodule(self.part), LoRAConfig(r=2, target_modules=["0", "3"] if self.part else TARGETS))
            self.seen = [name for name, _ in self.named_parameters() if "lora" in name]


class InjectsAPartInConfigureModel(InjectsInConfigureModel):
    part = "body"


class InjectsBesideAnEarlierLayer(InjectsInConfigureModel):
    def prepare(self) -> None:
        self.first = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model_class", "options"),
    [(InjectsInConfigureModel, {"r": 2, "target_modules": TARGETS}), (InjectsBesideAnEarlierLayer, {})],
)
def test_inject_inside_configure_model_is_seen(tmp_path, model_class: type[Net], options: dict[str, Any]):
    model = model_class()
    trainer = fit_model(tmp_path, model, LoRACallback(save="merged", **options))
    assert adapted(model) == TARGETS
    assert len(model.seen) == 2 * len(TARGETS)
    assert {layer.lora_A.size(0) for layer in map(model.get_submodule, TARGETS)} == {2}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["lora"]["kind"] == "merged"


def test_inject_of_a_part_inside_configure_model_is_seen(tmp_path):
    model = InjectsAPartInConfigureModel()
    trainer = fit_model(tmp_path, model, LoRACallback())
    assert adapted(model) == ["body.0", "body.3"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "body.0.weight" not in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("model_class", "r"), [(InjectsInConfigureModel, 8), (InjectsAPartInConfigureModel, 4)]
)  # 8 is the default
def test_inject_inside_configure_model_with_other_options_is_an_error(tmp_path, model_class: type[Net], r: int):
    with pytest.raises(LoRAError, match=f"r is {r}, but the model was injected with 2"):
        make_trainer(tmp_path, LoRACallback(r=r)).fit(model_class(), Data())


@pytest.mark.core
def test_adopts_an_injected_model(tmp_path):
    model = Net()
    inject(model, LoRAConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    factor = model.head.lora_A
    trainer = fit_model(tmp_path, model, LoRACallback())
    assert model.head.lora_A is factor
    assert model.head.lora_B.abs().sum() > 0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["lora"]["config"]["lora_alpha"] == 3
    assert "head.weight" not in saved["state_dict"]


def test_adopts_an_injected_part(tmp_path):
    model = Net()
    inject(model.body, LoRAConfig(r=2))
    make_trainer(tmp_path, LoRACallback(merged_eval=True)).fit(model, Data())
    assert adapted(model) == ["body.0", "body.3"]
    assert model.body[0].lora_B.abs().sum() > 0
    assert model.head.weight.requires_grad


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 4}, "r is 4, but the model was injected with 2"),
        ({"target_modules": ["head"]}, r"target_modules is \('head',\), but"),
    ],
)
def test_a_differing_option_is_an_error_that_names_it(tmp_path, options: dict[str, Any], named: str):
    model = Net()
    inject(model, LoRAConfig(r=2, target_modules=TARGETS))
    before = weights(model)
    with pytest.raises(LoRAError, match=named):
        make_trainer(tmp_path, LoRACallback(**options)).fit(model, Data())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "options", "copied"),
    [
        ([], {"r": 8}, lambda callback: callback),
        ([], {"lora_alpha": 8.0, "target_modules": "all-linear"}, copy.deepcopy),
        ([], {"bias": "none"}, lambda callback: pickle.loads(pickle.dumps(callback))),
        ([LoRAConfig()], {}, copy.deepcopy),
    ],
)
def test_an_option_that_is_given_counts_at_its_default_too(
    tmp_path, config: list[LoRAConfig], options: dict[str, Any], copied: Callable[[LoRACallback], LoRACallback]
):
    model = Net()
    inject(model, LoRAConfig(r=4, lora_alpha=3, target_modules=TARGETS, bias="all"))
    with pytest.raises(LoRAError, match=r"but the model was injected with.*leave it out"):
        make_trainer(tmp_path, copied(LoRACallback(*config, **options))).fit(model, Data())


@pytest.mark.parametrize("dropout", [0.5, 0.0])
def test_dropout_that_is_given_takes_the_place_of_an_injected_models(tmp_path, dropout: float):
    inject(model := Net(), LoRAConfig(r=2, target_modules=TARGETS, lora_dropout=0.25))
    trainer = fit_model(tmp_path, model, LoRACallback(lora_dropout=dropout))
    assert {layer.lora.spec.dropout for layer in (model.body[0], model.body[3], model.head)} == {dropout}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["lora"]["config"]["lora_dropout"] == dropout
    make_trainer(tmp_path, LoRACallback()).fit(model, Data())
    assert model.head.lora.spec.dropout == dropout


def test_an_option_that_a_subclass_gives_counts_and_one_that_it_leaves_out_does_not(tmp_path):
    class Own(LoRACallback):
        def __init__(self, rank: int | None = None) -> None:
            super().__init__(**({} if rank is None else {"r": rank}))

    model = Net()
    inject(model, LoRAConfig(r=4, target_modules=TARGETS))
    make_trainer(tmp_path, Own()).fit(model, Data())
    with pytest.raises(LoRAError, match="r is 8, but the model was injected with 4"):
        make_trainer(tmp_path, Own(8)).fit(model, Data())


def test_options_of_the_callback_alone_adopt_what_was_injected(tmp_path):
    model = Net()
    inject(model, LoRAConfig(r=4, target_modules=TARGETS), seed=5)
    make_trainer(tmp_path, LoRACallback(merged_eval=True, save="adapter", seed=None)).fit(model, Data())
    assert model.head.lora_A.shape[0] == 4


@pytest.mark.core
def test_merge_weights_is_refused_with_the_reason(tmp_path):
    model = Net()
    inject(model, LoRAConfig(r=2, target_modules=TARGETS), merge_weights=True)
    with pytest.raises(LoRAError, match=r"merge_weights=True.*eval mode would silently stop training.*unload\(model\)"):
        make_trainer(tmp_path, LoRACallback()).fit(model, Data())
    with pytest.raises(LoRAError, match=r"inject: Net was injected with merge_weights=True; unload it first\.$"):
        inject(model, LoRAConfig(r=2, target_modules=TARGETS))
    unload(model)
    inject(model, LoRAConfig(r=2, target_modules=TARGETS))
    make_trainer(tmp_path, LoRACallback()).fit(model, Data())


def test_another_seed_than_that_of_an_injected_model_is_refused(tmp_path):
    inject(model := Net(), LoRAConfig(r=2, target_modules=TARGETS), seed=1)
    with pytest.raises(LoRAError, match="the model was injected with another seed; give none, or unload"):
        make_trainer(tmp_path, LoRACallback(seed=2)).fit(model, Data())
    make_trainer(tmp_path, LoRACallback(seed=1)).fit(model, Data())


def test_a_second_fit_keeps_the_fingerprint_of_the_base_that_the_first_trained_on(tmp_path):
    callback = LoRACallback(r=2, target_modules=TARGETS)
    make_trainer(tmp_path, callback).fit(model := Net(), Data())
    first = open_model(model, "test").fingerprint()
    assert first
    with torch.no_grad():
        model.head.weight.add_(1)  # the adapter belongs to what it was
    make_trainer(tmp_path, callback).fit(model, Data())
    assert open_model(model, "test").fingerprint() == first


def test_a_merge_by_hand_stays_after_an_evaluation_that_a_training_batch_broke_off(tmp_path):
    """As of a program with a loop of its own, which calls the hooks."""
    callback = LoRACallback(r=2, target_modules=TARGETS)
    trainer = fit_model(tmp_path, model := Net(), callback)
    callback.on_validation_batch_start(trainer, model)
    assert is_merged(model)
    callback.on_train_batch_start(trainer, model)
    assert not is_merged(model)
    merge(model)
    callback.on_validation_epoch_end(trainer, model)
    assert is_merged(model)


def test_taking_adapters_of_a_part_out_leaves_the_lightning_module_without_patches(tmp_path):
    model = Net()
    inject(model.body, LoRAConfig(r=2))
    make_trainer(tmp_path, LoRACallback()).fit(model, Data())
    assert "on_save_checkpoint" in vars(model)
    merge_and_unload(model)
    assert not {"on_save_checkpoint", "on_load_checkpoint"} & vars(model).keys()


class HeadOnly(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.core
def test_an_adapter_that_no_optimizer_holds_is_an_error(tmp_path):
    with pytest.raises(LoRAError, match=r"no optimizer holds the adapter parameter 'body\.0\.lora_A'"):
        make_trainer(tmp_path, LoRACallback(r=2, target_modules=TARGETS)).fit(HeadOnly(), Data())


class FreezesBody(L.Callback):
    """What a BackboneFinetuning listed after LoRACallback does in its setup."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.body.requires_grad_(False)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("LoRA: ")]


@pytest.mark.core
def test_fit_start_shows_the_summary_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        trainer = fit_model(tmp_path, model := Net(), LoRACallback(r=2, save="full", merged_eval=False), max_epochs=2)
        trainer.test(model, Data(), verbose=False)
    assert said(caplog) == [summary(model).short()]
    # A and B of 6 -> 8, 8 -> 8 and 8 -> 3 at r = 2; the base has 3 layers and a BatchNorm.
    trainable = 2 * (6 + 8 + 8 + 8 + 8 + 3)
    total = trainable + (6 * 8 + 8) + 2 * 8 + (8 * 8 + 8) + (8 * 3 + 3)
    assert f"{trainable} of {total} parameters ({trainable / total:.2%})" in said(caplog)[0]
    assert "factored (merged_eval=False)" in said(caplog)[0]
    assert 'base and adapter (save="full")' in str(summary(model))


def test_a_fit_after_another_says_that_it_trains_the_same_adapter_further(tmp_path, caplog):
    further = (
        "lightning_lora: training goes on from the adapter that the model holds. For a new one, unload(model) first."
    )

    def fit(model: Net, path: Any = None) -> L.Trainer:
        caplog.clear()
        return fit_model(tmp_path, model, LoRACallback(r=2), ckpt_path=path, max_epochs=2 if path else 1)

    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        fit(model := Net()).save_checkpoint(tmp_path / "a.ckpt")
        assert further not in caplog.text
        fit(model)
        assert caplog.text.count(further) == 1
        fit(model, tmp_path / "a.ckpt")  # the checkpoint's adapter takes its place
        assert further not in caplog.text
        unload(model)
        fit(model)
        assert further not in caplog.text


def test_verbose_false_shows_nothing_at_fit_start_and_still_warns(tmp_path, caplog):
    trainer = make_trainer(tmp_path, LoRACallback(r=2, target_modules=TARGETS, verbose=False), FreezesBody())
    with (
        caplog.at_level(logging.INFO, logger="lightning_lora"),
        pytest.warns(UserWarning, match=r"the adapters of 2 layers are frozen \('body\.0', 'body\.3'\)"),
    ):
        trainer.fit(Net(), Data())
    assert not [message for message in map(logging.LogRecord.getMessage, caplog.records) if "LoRA" in message]


def test_the_summary_is_shown_on_rank_zero_alone(tmp_path, caplog, monkeypatch):
    class OnRank(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            monkeypatch.setattr(rank_zero_only, "rank", 1)

    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        make_trainer(tmp_path, OnRank(), LoRACallback(r=2)).fit(Net(), Data())
    assert said(caplog) == []


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(LoRACallback()) == "LoRACallback()"
    assert repr(LoRACallback(save="merged", r=16)) == "LoRACallback(r=16, save='merged')"
    callback = LoRACallback(LoRAConfig(r=4, target_modules=TARGETS), seed=3, verbose=False)
    assert repr(callback) == f"LoRACallback(r=4, target_modules={tuple(TARGETS)}, seed=3, verbose=False)"
    assert repr(eval(repr(callback))) == repr(callback)


@pytest.mark.core
def test_callback_used_on_two_models_keeps_them_apart(tmp_path):
    callback = LoRACallback(r=2, target_modules=TARGETS)
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    first, second = Net(seed=1), Net(seed=2)
    trainer.fit(first, Data())
    kept = weights(first)
    make_trainer(tmp_path, callback, max_epochs=2).fit(second, Data())
    make_trainer(tmp_path, callback).test(first, Data(), verbose=False)
    assert all(torch.equal(kept[name], value) for name, value in first.state_dict().items())
    for model, seed in ((first, 1), (second, 2)):
        with disable_adapter(model):
            assert torch.equal(outputs(model), outputs(Net(seed=seed)))
        unload(model)
