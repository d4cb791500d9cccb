"""LoRAWeightAveraging: Lightning's own average of what is trained, with one base in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    LoRAWeightAveraging,
    averaging,
    inject,
    is_merged,
    load_from_checkpoint,
)
from support.covering import covering
from support.models.quantized import QuantizedNet, batches, factors, packed_bits
from support.runs.lightning_versions import EMAWeightAveraging, WeightAveraging, weight_averaging
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, weights
from support.runs.with_callback import (
    SWAPPERS,
    TARGETS,
    At,
    BrokenError,
    base_weights,
    lora,
    lora_with_effect,
    reference_loss,
)

OURS = {
    "mean": LoRAWeightAveraging,
    "mean without buffers": lambda: LoRAWeightAveraging(use_buffers=False),
    "ema": lambda: LoRAWeightAveraging(0.8),
    "ema every second step": lambda: LoRAWeightAveraging(0.5, update_every_n_steps=2),
    "ema from step 4": lambda: LoRAWeightAveraging(0.5, update_starting_at_step=4),
    "ema each epoch": lambda: LoRAWeightAveraging(0.5, update_every_n_steps=0, update_starting_at_epoch=0),
    "function": lambda: LoRAWeightAveraging(avg_fn=get_ema_avg_fn(0.8), device="cpu"),
    "function of many": lambda: LoRAWeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=False),
}
LIGHTNINGS = SWAPPERS | {
    "function": lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.8)),
    "function of many": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=False),
}
KINDS = ["adapter", "merged", "full"]
pytestmark = [
    weight_averaging,
    pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need",
        "ignore:The dirpath has changed from",
    ),
]


class Losses(Net):
    """Notes the loss of each validation in `seen`."""

    def on_validation_epoch_end(self) -> None:
        self.seen.append(self.trainer.callback_metrics["val_loss"].item())


def fit(path: Path, model: Net, *callbacks: L.Callback, epochs: int = 4, resume: Path | None = None) -> L.Trainer:
    torch.manual_seed(0)
    keep = ModelCheckpoint(path, "{epoch}", monitor="val_loss", save_top_k=-1)
    return fit_model(path, model, *callbacks, keep, ckpt_path=resume, max_epochs=epochs)


def close(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether all values are equal to 1e-7, those of other types exactly."""
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[n], expected[n], rtol=1e-7, atol=1e-7) for n in found)


@pytest.mark.parametrize(("name", "kind", "merged_eval"), covering([*OURS], KINDS, [True, False], meet=1))
def test_everything_equals_lightnings_own_average_and_the_base_keeps_its_bits(
    tmp_path: Path, name: str, kind: str, merged_eval: bool
):
    """Lightning's own frozen weights leave their bits: the average of equal numbers is not always that number."""
    models = {}
    for whose, average in (("ours", OURS[name]()), ("lightning", LIGHTNINGS[name]())):
        models[whose] = model = Losses()
        base = base_weights(model)
        fit(tmp_path / whose, model, lora_with_effect(merged_eval=merged_eval, save=kind), average)
    assert_same_tensors(base_weights(models["ours"]), base)
    trained = [{n: v for n, v in weights(model).items() if n not in base} for model in models.values()]
    assert len(trained[0]) == 9
    assert close(*trained)
    assert models["ours"].seen == pytest.approx(models["lightning"].seen, rel=1e-6)
    for file in (tmp_path / "ours").glob("*.ckpt"):
        mine, theirs = (torch.load(tmp_path / whose / file.name, weights_only=True) for whose in ("ours", "lightning"))
        assert mine.keys() == theirs.keys()
        for part in ("current_model_state", "averaging_state"):
            assert close(mine[part], theirs[part])
        if kind == "adapter":
            assert close(mine["state_dict"], theirs["state_dict"])
        else:
            assert reference_loss(mine["state_dict"]) == pytest.approx(reference_loss(theirs["state_dict"]), rel=1e-6)


@pytest.mark.parametrize(("name", "kind"), covering(["mean", "ema", "mean without buffers"], KINDS, meet=1))
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, name: str, kind: str):
    whole, second = Losses(), Losses()
    fit(tmp_path / "whole", whole, lora_with_effect(save=kind), OURS[name]())
    fit(
        tmp_path / "second",
        second,
        lora_with_effect(save=kind),
        OURS[name](),
        resume=tmp_path / "whole" / "epoch=1.ckpt",
    )
    assert_same_tensors(weights(second), weights(whole))
    assert second.seen == whole.seen[2:]
    names = ("state_dict", "current_model_state", "averaging_state")
    files = [torch.load(tmp_path / run / "epoch=3.ckpt", weights_only=True) for run in ("whole", "second")]
    for part in names:
        assert_same_tensors(files[1][part], files[0][part])


def test_a_checkpoint_of_lightnings_own_average_is_gone_on_with_and_the_other_way_round(tmp_path: Path):
    ends = []
    for first, second in ((EMAWeightAveraging, LoRAWeightAveraging), (LoRAWeightAveraging, EMAWeightAveraging)):
        path = tmp_path / first.__name__
        fit(path, Net(), lora_with_effect(), first(decay=0.8), epochs=2)
        fit(path, model := Net(), lora_with_effect(), second(decay=0.8), resume=path / "epoch=1.ckpt")
        ends.append({n: v for n, v in weights(model).items() if "lora" in n})
    assert close(*ends)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_its_logged_metric_in_the_trainer_that_fitted_and_elsewhere(tmp_path: Path, kind: str):
    trainer = fit(tmp_path, model := Losses(), lora_with_effect(save=kind), LoRAWeightAveraging(0.8))
    file, expected = tmp_path / "epoch=1.ckpt", pytest.approx(model.seen[1], rel=1e-5)
    assert model.seen[3] != expected
    assert reference_loss(load_from_checkpoint(Net, file).state_dict()) == expected
    for each in (trainer, make_trainer(tmp_path, lora_with_effect(save=kind), LoRAWeightAveraging(0.8))):
        assert each.validate(model, Data(), ckpt_path=file, verbose=False)[0]["val_loss"] == expected
        assert each.test(model, Data(), ckpt_path=file, verbose=False)[0]["test_loss"] == expected


class Counts(Net):
    """Has a buffer that it replaces, a mask, and a trained parameter under two names."""

    def prepare(self) -> None:
        super().prepare()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.scale = self.same = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count = self.count + 1
        return super().training_step(batch, batch_idx) * self.scale(self.count)


def test_buffers_that_are_replaced_masks_and_tied_parameters_are_averaged_as_they_can_be(tmp_path: Path):
    model, alone = Counts(), Counts()
    fit(tmp_path, model, lora_with_effect(modules_to_save=["scale"]), LoRAWeightAveraging(), epochs=2)
    fit(tmp_path / "alone", alone, lora_with_effect(modules_to_save=["scale"]), epochs=2)
    assert model.count.item() == 3.5  # the mean of 1 to 6
    assert model.mask.all()
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    current, end = checkpoint["current_model_state"], alone.state_dict()
    assert_same_tensors(current, {name: end[name] for name in current})
    assert torch.equal(checkpoint["state_dict"]["same.weight"], checkpoint["state_dict"]["scale.weight"])
    assert not torch.equal(checkpoint["state_dict"]["same.weight"], current["same.weight"])


def test_one_base_is_in_memory_and_frozen_weights_are_not_touched(tmp_path: Path):
    average, model = LoRAWeightAveraging(0.9), Net(width=64)
    versions = {n: p._version for n, p in model.named_parameters()}
    fit(tmp_path, model, lora(merged_eval=False), average, epochs=1)
    held = sum(tensor.nbytes for tensor in average._average_model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) + sum(b.nbytes for b in model.buffers())
    assert held == trained + 8  # the number of averaged states
    assert held < sum(p.nbytes for p in model.parameters()) / 4
    assert {n: p._version for n, p in model.named_parameters() if n in versions} == versions


def test_a_quantized_base_is_averaged_beside(tmp_path: Path):
    """Lightning's own is refused, because it would average packed bytes."""
    model, ends = QuantizedNet("nf4"), []
    lora, watch = LoRACallback(r=2), At("on_train_batch_end", lambda trainer, module: ends.append(factors(module)))
    make_trainer(tmp_path, lora, LoRAWeightAveraging(), watch, max_epochs=1).fit(model, batches(), batches(2))
    assert packed_bits(model) == packed_bits(QuantizedNet("nf4"))
    for name, value in factors(model).items():
        assert torch.allclose(value, torch.stack([end[name] for end in ends]).mean(0), atol=1e-6)


def test_a_validation_that_an_exception_ends_leaves_the_current_values(tmp_path: Path):
    def save_and_break(trainer: L.Trainer, model: L.LightningModule) -> None:
        assert is_merged(model)
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
        raise BrokenError

    model, seen = Net(), {}
    before = At("on_validation_start", lambda trainer, module: seen.update(weights(module)))
    breaks = At("on_validation_batch_end", save_and_break)
    base = base_weights(model)
    with pytest.raises(BrokenError):
        make_trainer(tmp_path, lora_with_effect(), LoRAWeightAveraging(0.8), before, breaks).fit(model, Data())
    assert not is_merged(model)
    assert_same_tensors(weights(model), seen)
    assert_same_tensors(base_weights(model), base)
    checkpoint = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    current, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert_same_tensors(current, {name: seen[name] for name in current})
    assert not torch.equal(average["head.lora_B"], current["head.lora_B"])


class Unfreezes(BaseFinetuning):
    """Unfreezes the head's bias in the third epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            pl_module.head.bias.requires_grad_(True)


@pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen after injection")
def test_what_is_unfrozen_during_the_fit_is_averaged_from_then_on(tmp_path: Path):
    ends = []
    for average in (LoRAWeightAveraging(0.8), EMAWeightAveraging(decay=0.8)):
        fit(tmp_path / type(average).__name__, model := Net(), lora_with_effect(), Unfreezes(), average)
        ends.append({n: v for n, v in weights(model).items() if "lora" in n or n == "head.bias"})
    assert not torch.equal(ends[0]["head.bias"], Net().head.bias)
    assert close(*ends)


def test_adapters_that_were_injected_by_hand_need_no_lora_callback(tmp_path: Path):
    def injected() -> Losses:
        inject(model := Losses(), LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=False), seed=1)
        return model

    whole, second, theirs = injected(), injected(), injected()
    fit(tmp_path / "whole", whole, LoRAWeightAveraging(0.8))
    fit(tmp_path / "theirs", theirs, EMAWeightAveraging(decay=0.8))
    fit(tmp_path / "second", second, LoRAWeightAveraging(0.8), resume=tmp_path / "whole/epoch=1.ckpt")
    assert whole.seen == pytest.approx(theirs.seen, rel=1e-6)
    assert_same_tensors(weights(second), weights(whole))


def test_merged_for_good_the_layers_have_the_average(tmp_path: Path):
    fit(tmp_path / "a", model := Net(), lora_with_effect(), LoRAWeightAveraging(0.8))
    trainer = fit(tmp_path / "b", plain := Net(), lora_with_effect(merge_after_fit=True), LoRAWeightAveraging(0.8))
    assert reference_loss(plain.state_dict()) == pytest.approx(reference_loss(model.state_dict()), rel=1e-5)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert_same_tensors(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"], plain.state_dict())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 1.0}, r"decay must be from 0 and below 1, but it is 1\.0"),
        ({"decay": 0.9, "avg_fn": max}, "give decay or avg_fn, not both"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], said: str):
    with pytest.raises(LoRAError, match=f"^LoRAWeightAveraging: {said}"):
        LoRAWeightAveraging(**options)


def test_a_model_without_an_adapter_and_the_wrong_order_are_refused(tmp_path: Path):
    with pytest.raises(LoRAError, match=r"Net has no adapter\. Put a LoRACallback"):
        fit(tmp_path, Net(), LoRAWeightAveraging())
    with pytest.raises(LoRAError, match=r"callbacks=\[LoRACallback\(\.\.\.\), LoRAWeightAveraging\(\.\.\.\)\]"):
        fit(tmp_path, Net(), LoRAWeightAveraging(), lora())


def test_lightning_without_weight_averaging_is_named_when_it_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(averaging, "EMAWeightAveraging", L.Callback)
    with pytest.raises(LoRAError, match=r"Install lightning>=2\.6"):
        LoRAWeightAveraging()
