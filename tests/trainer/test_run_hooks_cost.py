"""The cost of the callback's hooks at each batch: modules that they visit are counted, none from the second on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject, is_merged, merge, unload
from lightning_lora.model import adapted_model
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.nn.adapted_weights import LayerState
from support.runs.training import Data, Net, make_trainer

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


def test_no_training_batch_but_the_first_visits_a_module(tmp_path, visits):
    make_trainer(tmp_path, LoRACallback(r=2, lora_dropout=0.5)).fit(Net(), Data(BATCHES))
    counted = later(visits)
    assert {name for name, _ in counted} >= {"on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"}
    assert not any(counted.values()), counted
    assert visits["on_train_batch_start", 0] > 0  # the counter counts


@pytest.mark.parametrize(("loop", "merged_eval"), [("validation", True), ("test", False), ("predict", True)])
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
def test_what_is_unfrozen_within_an_epoch_is_saved_and_named_where_its_first_value_is_asked_for(tmp_path):
    class Unfreezes(Net):
        def on_before_backward(self, loss: torch.Tensor) -> None:
            if self.trainer.global_step == 1:
                self.body[0].bias.requires_grad_(True)

    model = Unfreezes()
    before = model.body[0].bias.detach().clone()
    make_trainer(tmp_path, LoRACallback(r=2)).fit(model, Data(BATCHES))
    changed = model.body[0].bias.detach().clone()
    assert not torch.equal(changed, before)
    assert torch.equal(adapter_state_dict(model)["body.0.bias"], changed)
    with pytest.warns(UserWarning, match=r"unload cannot bring back .* \(body.0.bias\), and leaves it as it is"):
        unload(model)
    assert torch.equal(model.body[0].bias, changed)


def test_hooks_of_a_step_ask_no_layer(tmp_path):
    """The state of a layer notes each attribute that is read. The hooks of a step read none."""
    reads: list[str] = []

    class Counting(LayerState):
        def __getattribute__(self, name: str) -> Any:
            reads.append(name)
            return super().__getattribute__(name)

    class Watches(LoRACallback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            self.count(super().on_train_batch_start, trainer, pl_module)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.count(super().on_before_optimizer_step, trainer, pl_module, optimizer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            self.count(super().on_train_batch_end, trainer, pl_module)

        def count(self, hook: Any, trainer: Any, *args: Any) -> None:
            reads.clear()
            hook(trainer, *args)
            counts.append((trainer.global_step, len(reads)))

    class Swaps(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for layer in adapted_layers(pl_module).values():
                layer.lora.__class__ = Counting

    counts: list[tuple[int, int]] = []
    options: dict[str, Any] = {"r": 2, "lora_dropout": 0.5}
    model = Net()
    inject(model.body, LoRAConfig(**options))
    make_trainer(tmp_path, Watches(**options), Swaps()).fit(model, Data(BATCHES))
    assert sum(number for step, number in counts if step == 0) > 0  # the counter counts
    assert len(counts) == 3 * BATCHES
    assert not any(number for step, number in counts if step > 1)
