"""A Trainer with LoRACallback: merged exactly while evaluating, unmerged everywhere else, whatever happens."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, disable_adapter, inject, is_merged
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lora_layer import LoRALayer
from support.runs.notices import UNTRAINED_NOTICE
from support.runs.training import (
    BuiltInConfigureModel,
    Data,
    Net,
    RebuiltInSetup,
    assert_same_tensors,
    fit_model,
    make_trainer,
    outputs,
)
from support.runs.with_callback import BATCHES, TARGETS, Steps, lora, run, trained

pytestmark = [UNTRAINED_NOTICE, pytest.mark.core]

HOOKS = [
    name
    for name in vars(L.Callback)
    if name.startswith(("on_", "setup", "teardown")) and "checkpoint" not in name and name != "on_exception"
]


class Timeline(L.Callback):
    """Whether the model is merged in each hook, seen from the end of the list of callbacks."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bool]] = []

    def when(self, merged: bool) -> set[str]:
        return {name for name, found in self.events if found is merged}


def _note(name: str) -> Callable[..., None]:
    def hook(self: Timeline, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        self.events.append((name, is_merged(pl_module)))

    return hook


for _name in HOOKS:
    setattr(Timeline, _name, _note(_name))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often adapted layers ran factored, and how often their base class's forward ran."""
    counts: Counter[str] = Counter()

    def count(owner: type, method: str, key: str) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def counted(self: nn.Module, *args: Any) -> Any:
            counts[key] += isinstance(self, LoRALayer)
            return original(self, *args)

        monkeypatch.setattr(owner, method, counted)

    count(LoRALinear, "factored_forward", "factored")
    count(nn.Linear, "forward", "base")
    return counts


EVALUATIONS = [("fit", "validation"), ("validate", "validation"), ("test", "test"), ("predict", "predict")]


@pytest.mark.parametrize(("stage", "phase"), EVALUATIONS)
def test_merged_exactly_during_evaluation_batches(tmp_path, stage: str, phase: str):
    model, timeline = Steps(), Timeline()
    run(make_trainer(tmp_path, lora(), timeline, num_sanity_val_steps=1, max_epochs=2), stage, model)
    batches = {f"on_{phase}_batch_start", f"on_{phase}_batch_end"}
    assert timeline.when(merged=True) == batches
    assert timeline.when(merged=False) >= {
        "setup",
        f"on_{phase}_start",
        f"on_{phase}_epoch_start",
        f"on_{phase}_epoch_end",
        f"on_{phase}_end",
        "teardown",
    }
    assert timeline.when(merged=False).isdisjoint(batches)
    assert model.when(merged=True) == {f"{phase}_step"}
    assert model.when(merged=False) == ({"training_step"} if stage == "fit" else set())


def test_merged_eval_false_never_merges(tmp_path, calls: Counter[str]):
    model, timeline = Steps(), Timeline()
    run(make_trainer(tmp_path, lora(merged_eval=False), timeline), "test", model)
    assert timeline.when(merged=True) == model.when(merged=True) == set()
    assert calls == Counter(factored=len(TARGETS) * BATCHES, base=len(TARGETS) * BATCHES)


def test_merged_validation_inside_fit_runs_only_the_base_forward(tmp_path, calls: Counter[str]):
    class During(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            calls.clear()

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.append(Counter(calls))

    found: list[Counter[str]] = []
    trained(tmp_path, Net(), lora(), During(), max_epochs=2)
    assert found == [Counter(factored=0, base=len(TARGETS) * BATCHES)] * 2


def test_layers_built_anew_in_each_stage_are_adapted_anew(tmp_path):
    model = trained(tmp_path, RebuiltInSetup(), lora(bias="lora_only"), max_epochs=2)
    first = model.head
    run(make_trainer(tmp_path, lora(bias="lora_only")), "test", model)
    assert model.head is not first
    assert torch.equal(outputs(model), outputs(Net()))
    trained(tmp_path, model, lora(bias="lora_only"), max_epochs=2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{leaf}" for name in TARGETS for leaf in ("lora_A", "lora_B", "bias")}
    assert torch.equal(model.head.weight, Net().head.weight)
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(Net()))


def test_shuffled_data_comes_in_the_same_order_as_without(tmp_path):
    class Order(L.Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.seen.append(torch.get_rng_state())

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch[0].clone())

    def order(*callbacks: L.Callback) -> list[torch.Tensor]:
        found = Order()
        torch.manual_seed(5)
        fit_model(tmp_path, BuiltInConfigureModel(), *callbacks, found, data=Data(BATCHES, shuffle=True), max_epochs=2)
        return found.seen

    plain = order()
    assert_same_tensors(order(lora(init_lora_weights="gaussian")), plain)
    assert not torch.equal(plain[1], plain[1 + BATCHES]), "the data is shuffled"


def test_inject_before_fit_is_the_same_as_the_callbacks_own(tmp_path):
    own = trained(tmp_path, Net(), lora(), max_epochs=2)
    torch.manual_seed(0)
    model = Net()
    inject(model, LoRAConfig(r=2, target_modules=TARGETS))
    trained(tmp_path, model, LoRACallback(), max_epochs=2)
    assert_same_tensors(model.state_dict(), own.state_dict())
