"""Layers that are read and not called, under a Trainer: trained from the first batch where the adapter can follow, and
named before the first step where it cannot.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    attach,
    inject,
    load_from_checkpoint,
    merge,
    merged,
    take_adapter,
    unload,
)
from lightning_lora.adapter.adapter import Adapter
from support.runs.training import FEATURES, Data, Net, fit_model, make_trainer, outputs, own_random_stream


class Reads(Net):
    """Reads layers in forward, and in the training step."""

    def build_head(self) -> None:
        super().build_head()
        with own_random_stream(5):
            self.decoder = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(x), self.head.weight, self.head.bias)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        decoded = F.linear(batch[0], self.decoder.weight)
        return super().training_step(batch, batch_idx) + decoded.square().mean()


class ReadFromOutside(Net):
    """Of a layer of this module a function reads the weight that has it from elsewhere."""

    def build_head(self) -> None:
        super().build_head()
        self.decoder = nn.Linear(FEATURES, FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + penalty(dict(self.named_modules()), batch[0])


def penalty(modules: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, getattr(modules["decoder"], "weight")).square().mean()  # noqa: B009


def test_layers_that_a_module_reads_train_from_the_first_batch(tmp_path):
    callback = LoRACallback(r=2)
    model = Reads()
    trainer = fit_model(tmp_path, model, callback, limit_train_batches=1, limit_val_batches=1)
    factors = {name: factor for name, factor in model.named_parameters() if name.endswith("lora_B")}
    assert len(factors) == 4
    assert all(factor.any() for factor in factors.values())
    unmerged = outputs(model)
    with merged(model):
        torch.testing.assert_close(outputs(model), unmerged)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(outputs(load_from_checkpoint(Reads, tmp_path / "a.ckpt")), unmerged)
    unload(model)
    assert type(model) is Reads


def test_a_layer_that_the_first_batch_does_not_train_is_named_once(tmp_path):
    with pytest.warns(UserWarning, match="no gradient") as caught:
        make_trainer(tmp_path, LoRACallback(r=2), max_epochs=2, num_sanity_val_steps=1).fit(ReadFromOutside(), Data())
    (message,) = [str(each.message) for each in caught if "no gradient" in str(each.message)]
    assert "adapters of 1 of 4 layers: 'decoder'. Either" in message
    assert message.endswith("exclude_modules=['decoder'].")


class Adversarial(Net):
    """Two optimizers, one after the other, in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build_head(self) -> None:
        super().build_head()
        self.critic = nn.Linear(FEATURES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), (super().training_step, self._critic_loss), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    def _critic_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.critic(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        parts = [[*self.body.parameters(), *self.head.parameters()], self.critic.parameters()]
        return [torch.optim.SGD(part, 0.1) for part in parts]


class Hesitates(Net):
    """Skips its first batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.global_step == 0 and batch_idx == 0 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    ("model", "options"), [(Net, {"accumulate_grad_batches": 2}), (Adversarial, {}), (Hesitates, {}), (Reads, {})]
)
def test_a_fit_that_trains_every_layer_warns_of_nothing(tmp_path, model: type[Net], options: dict[str, Any]):
    rank = 1 if model is Adversarial else 2  # whose critic has one output
    make_trainer(tmp_path, LoRACallback(r=rank), **options).fit(model(), Data())


class MergesInItsStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        merge(self)
        return super().training_step(batch, batch_idx)


@pytest.mark.core
def test_an_error_of_training_while_merged_names_merged(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"does not require grad.*\. The adapters are merged, .* call unmerge\(model\)"
    ):
        make_trainer(tmp_path, LoRACallback(r=2)).fit(MergesInItsStep(), Data())


class TakesTurns(Adversarial):
    """The critic is trained in each batch, the rest in the last batch of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        turns = [(second, self._critic_loss), *([(first, super(Adversarial, self).training_step)] * (batch_idx == 2))]
        for optimizer, loss in turns:
            optimizer.zero_grad()
            self.manual_backward(loss(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        rest = [*self.body.parameters(), *self.head.parameters()]
        return torch.optim.SGD(rest, 0.1), torch.optim.SGD(self.critic.parameters(), 0.1)


class WarmsUp(Net):
    """The learning rate is 0 in the first two steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, step - 1) / 4)
        return [optimizer], [{"scheduler": rate, "interval": "step"}]


class HesitatesAndWarmsUp(Hesitates, WarmsUp):
    configure_optimizers = WarmsUp.configure_optimizers


class SkipsSteps(Net):
    """Drops the gradients of its first steps, as code that scales losses does where they overflow."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step < 2:
            self.zero_grad()


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    ("cls", "variant", "accumulate"),
    [(TakesTurns, "lora", 1), (WarmsUp, "loha", 1), (HesitatesAndWarmsUp, "dora", 2), (SkipsSteps, "lora", 2)],
)
def test_a_right_fit_that_begins_slowly_warns_of_nothing(tmp_path, cls, variant: str, accumulate: int):
    """Merged at each batch, with adapters that begin without an effect."""
    options = {"val_check_interval": 1, "num_sanity_val_steps": 1, "accumulate_grad_batches": accumulate}
    make_trainer(tmp_path, LoRACallback(r=1, variant=variant), **options).fit(cls(), Data())


class TrainsItsHeadAlone(Net):
    """Adapters are cut off from the loss, and no gradient is left at the end of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(F.cross_entropy(self.head(self.body(batch[0]).detach()), batch[1]))
        optimizer.step()
        optimizer.zero_grad()


class HesitatesAndReads(ReadFromOutside):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (TrainsItsHeadAlone, {"modules_to_save": ["head"]}, "of 2 of 2 layers: 'body.0', 'body.3'"),
        (HesitatesAndReads, {}, "of 1 of 4 layers: 'decoder'"),
    ],
)
def test_layers_that_the_first_step_shows_to_be_untrained_are_named(tmp_path, cls, options, message: str):
    callback = LoRACallback(r=1, merged_eval=False, **options)
    with pytest.warns(UserWarning, match=f"no gradient has reached the adapters {message}"):
        make_trainer(tmp_path, callback).fit(cls(), Data())


class Freezes(Net):
    """The body is frozen in the first epoch, its adapters too. The optimizer holds them or does not."""

    holds_all = False

    def configure_optimizers(self) -> Any:
        self.body.requires_grad_(False)
        factors = [p for p in self.parameters() if self.holds_all or p.requires_grad]
        return torch.optim.AdamW(factors, 0.01)


class FreezesAndHolds(Freezes):
    holds_all = True


@pytest.mark.parametrize("cls", [Freezes, FreezesAndHolds])
def test_adapters_that_are_frozen_when_a_fit_begins_are_named_once(tmp_path, cls):
    with pytest.warns(UserWarning, match="lightning_lora: the adapters of 2 layers are frozen") as caught:
        make_trainer(tmp_path, LoRACallback(r=1), max_epochs=2).fit(cls(), Data())
    (text,) = [str(each.message) for each in caught if "are frozen" in str(each.message)]
    assert "('body.0', 'body.3') and not trained until something unfreezes them" in text


def test_what_a_finder_has_trained_is_looked_at_in_the_fit_that_follows(tmp_path):
    trainer = make_trainer(tmp_path, LoRACallback(r=1), max_epochs=1)
    Tuner(trainer).lr_find(model := ReadFromOutside(), datamodule=Data(), num_training=3, attr_name="lr")
    with pytest.warns(UserWarning, match="no gradient has reached the adapters of 1 of 4 layers: 'decoder'"):
        trainer.fit(model, Data())


# --- attached adapters that no forward reads ---

UNREAD = "no forward has read what is attached"


class AttachedOutside(ReadFromOutside):
    """Reads its decoder in every step, by a name that the adapter cannot follow."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        penalty(dict(self.named_modules()), batch[0])

    validation_step = test_step


def adapter_of(model: Net) -> Adapter:
    """An adapter of all layers of a model that has an effect."""
    inject(other := copy.deepcopy(model), LoRAConfig(r=1, target_modules="all-layers", init_lora_weights=False))
    return take_adapter(other)


def with_attached(cls: type[Net], **options: Any) -> tuple[Net, LoRACallback]:
    """A model with an adapter attached to all its layers, and a callback that trains one in the body alone."""
    attach(model := cls(), adapter_of(model), name="sft")
    return model, LoRACallback(r=1, target_modules=["3"], **options)


@pytest.mark.parametrize("merged_eval", [True, False])
@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_an_attached_adapter_that_no_forward_reads_is_named_once(tmp_path, run: str, merged_eval: bool):
    model, callback = with_attached(AttachedOutside, merged_eval=merged_eval)
    trainer = make_trainer(tmp_path, callback, max_epochs=2, num_sanity_val_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(trainer, run)(model, Data())
        getattr(trainer, run)(model, Data())
    messages = [str(each.message) for each in caught if UNREAD in str(each.message)]
    if merged_eval and run != "fit":  # merged it acts
        assert not messages
        return
    (message,) = messages
    assert "('sft') to 1 of 4 layers: 'decoder'. Either" in message
    assert "with merged(model):" in message


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.", f"error:.*{UNREAD}")
@pytest.mark.parametrize("cls", [Reads, Hesitates, HesitatesAndWarmsUp, SkipsSteps])
def test_attached_adapters_that_forwards_read_are_not_named(tmp_path, cls: type[Net]):
    model, callback = with_attached(cls, merged_eval=False)
    make_trainer(tmp_path, callback, max_epochs=2).fit(model, Data())
    make_trainer(tmp_path, callback).test(model, Data())


@pytest.mark.filterwarnings(f"error:.*{UNREAD}")
def test_what_the_second_of_two_optimizers_trains_is_waited_for(tmp_path):
    attach(model := TakesTurns(), adapter_of(model), name="sft")
    make_trainer(tmp_path, LoRACallback(r=1, target_modules=["3", "critic"])).fit(model, Data())
