"""The cost of the callback's hooks at each batch: modules that they visit are counted, none from the second on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject, is_merged, merge, unload
from lightning_lora.model import adapted_model
from lightning_lora.trainer.step_lists import StepLists
from support.training import Data, Net, make_trainer

BATCHES = 3
EVERY_BATCH = [
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    *(f"on_{loop}_batch_{end}" for loop in ("validation", "test", "predict") for end in ("start", "end")),
]


@pytest.fixture
def visits(monkeypatch) -> Counter[tuple[str, int]]:
    """Modules visited by each of the callback's hooks, by its name and how often it was called before in the loop."""
    counts: Counter[tuple[str, int]] = Counter()
    running: list[tuple[str, int]] = []
    calls: Counter[str] = Counter()
    named_modules = nn.Module.named_modules

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        for named in named_modules(self, *args, **kwargs):
            counts[running[-1]] += bool(running) if running else 0
            yield named

    def named(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return counting(self, *args, **kwargs) if running else named_modules(self, *args, **kwargs)

    list_places = adapted_model.list_places

    def listing(model: nn.Module) -> list[tuple[str, nn.Module]]:
        places = list_places(model)
        if running:
            counts[running[-1]] += len(places)
        return places

    def wrapped(name: str) -> Any:
        hook = getattr(LoRACallback, name)

        @functools.wraps(hook)
        def call(self: LoRACallback, *args: Any, **kwargs: Any) -> None:
            counts[name, calls[name]] += 0
            running.append((name, calls[name]))
            hook(self, *args, **kwargs)
            running.pop()
            calls[name] += 1

        return call

    def start_anew(self: LoRACallback, *args: Any) -> None:
        calls.clear()

    monkeypatch.setattr(nn.Module, "named_modules", named)
    monkeypatch.setattr(adapted_model, "list_places", listing)
    for name in EVERY_BATCH:
        monkeypatch.setattr(LoRACallback, name, wrapped(name))
    for name in ("on_train_start", "on_validation_start", "on_test_start", "on_predict_start"):
        monkeypatch.setattr(LoRACallback, name, start_anew)
    return counts


def later(visits: Counter[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Those of every batch but the first."""
    return {(name, call): count for (name, call), count in visits.items() if call > 0}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_training_batch_but_the_first_visits_a_module(tmp_path, visits, dropout: float):
    make_trainer(tmp_path, LoRACallback(r=2, lora_dropout=dropout)).fit(Net(), Data(BATCHES))
    counted = later(visits)
    assert {name for name, _ in counted} >= {"on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"}
    assert not any(counted.values()), counted
    assert visits["on_train_batch_start", 0] > 0  # the counter counts


@pytest.mark.parametrize("loop", ["validation", "test", "predict"])
@pytest.mark.parametrize("merged_eval", [True, False])
def test_no_evaluation_batch_but_the_first_visits_a_module(tmp_path, visits, loop: str, merged_eval: bool):
    trainer = make_trainer(tmp_path, LoRACallback(r=2, merged_eval=merged_eval))
    run = {"validation": trainer.validate, "test": trainer.test, "predict": trainer.predict}[loop]
    run(Net(), Data(BATCHES))
    counted = later(visits)
    assert {name for name, _ in counted} == {f"on_{loop}_batch_start", f"on_{loop}_batch_end"}
    assert not any(counted.values()), counted


class MergesInBetween(LoRACallback):
    """A user's hook that leaves the model merged, as a Trainer inside a hook may."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        merge(pl_module)


def test_a_model_that_a_hook_left_merged_trains_unmerged_all_the_same(tmp_path):
    class Watching(Net):
        def training_step(self, *args: Any) -> torch.Tensor:
            assert not is_merged(self)
            return super().training_step(*args)

    make_trainer(tmp_path, MergesInBetween(r=2)).fit(Watching(), Data(BATCHES))


@pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen after injection")
def test_what_is_unfrozen_within_an_epoch_is_recorded_before_it_changes(tmp_path):
    class Unfreezes(Net):
        def on_before_backward(self, loss: torch.Tensor) -> None:
            if self.trainer.global_step == 1:
                self.body[0].bias.requires_grad_(True)

    model = Unfreezes()
    before = model.body[0].bias.detach().clone()
    make_trainer(tmp_path, LoRACallback(r=2), max_epochs=2).fit(model, Data(BATCHES))
    changed = model.body[0].bias.detach().clone()
    assert not torch.equal(changed, before)
    unload(model)
    assert torch.equal(model.body[0].bias, before)


@pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen after injection")
def test_what_an_optimizer_without_lightnings_wrapper_changes_has_its_first_value_kept(tmp_path):
    class StepsItself(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, *args: Any) -> None:
            self.body[0].bias.requires_grad_(self.current_epoch == 1)
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(*args))
            optimizer.step()

    model = StepsItself()
    before = model.body[0].bias.detach().clone()
    make_trainer(tmp_path, LoRACallback(r=2), max_epochs=2).fit(model, Data(BATCHES))
    assert not torch.equal(model.body[0].bias, before)
    unload(model)
    assert torch.equal(model.body[0].bias, before)


class Frozen(nn.Parameter):
    """It counts how often anyone asks whether it is trained."""

    asked = 0

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        Frozen.asked += 1
        return False


class HoldsCopies(torch.optim.SGD):
    """As an optimizer with weights in float32 of its own, which are no parameters of the model."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__([parameter.detach().clone() for parameter in parameters], lr=0.1)


@pytest.mark.parametrize(
    ("held", "looks"),
    [
        (lambda model: torch.optim.SGD(each for each in model.parameters() if each.requires_grad), 0),
        (lambda model: torch.optim.SGD(model.parameters()), 1),
        (lambda model: HoldsCopies(model.parameters()), 1),
    ],
    ids=["its own", "all", "copies"],
)
def test_a_step_looks_at_the_frozen_parameters_that_its_optimizer_may_change(held: Any, looks: int):
    model = Net()
    inject(model, LoRAConfig(r=2))
    model.body[0].weight = Frozen(model.body[0].weight.detach(), requires_grad=False)
    optimizer, lists = held(model), StepLists(model)
    Frozen.asked = 0
    lists.record_trainable(optimizer)
    assert Frozen.asked == looks
    before = Frozen.asked
    optimizer.add_param_group({"params": model.body[0].weight}) if not looks else None
    lists.record_trainable(optimizer)
    assert Frozen.asked > before
