"""init_lora_weights="eva" in a Trainer: A from the training batches, and a run that is otherwise the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_lora import LoRACallback, LoRAConfig, LoRAError, initialize_from_data, inject, load_from_checkpoint
from support.ranks.processes import world
from support.ranks.sharded import RootSharded, model_parallel, whole_state
from support.ranks.sharded import loader as shard_loader
from support.ranks.sharded import make_trainer as sharded_trainer
from support.runs.training import (
    BATCH,
    CLASSES,
    FEATURES,
    Data,
    Net,
    assert_same_tensors,
    fit_model,
    make_trainer,
    weights,
)
from support.runs.with_callback import TARGETS, lora, trained


class Seen(Net):
    """Notes the batches that train it, and logs a metric of them."""

    untrained = logged = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mean, self.losses = MeanMetric(), []

    def log(self, name: str, *args: Any, **options: Any) -> None:
        self.logged += name == "mean"
        super().log(name, *args, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.untrained += not torch.is_grad_enabled()
        if self.training:
            self.losses.append(float(loss.detach()))
            self.seen.append((batch[0].clone(), torch.rand(()), random.random(), np.random.rand()))
        return loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.1 * torch.rand(()) * self.training)  # draws in training


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("lora_A")}


class AtStart(Net):
    """Keeps the factors with which training starts."""

    def on_train_epoch_start(self) -> None:
        self.seen.append(factors(self))


@pytest.mark.parametrize(("start", "batches", "used"), [("eva", 3, 3), ("eva", 18, 16), ("lora_ga", 12, 8)])
def test_factors_are_those_of_the_first_training_batches(tmp_path, start: str, batches: int, used: int):
    make_trainer(tmp_path, lora(init_lora_weights=start)).fit(model := AtStart(), Data(batches=batches))
    inject(plain := Net(), LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=start))
    first = list(Data(batches=batches).train_dataloader())[:used]
    initialize_from_data(plain, first, lambda module, batch: module.training_step(batch, 0))
    for name, value in factors(plain).items():
        torch.testing.assert_close(model.seen[0][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("eva", {}),
        ("lora_ga", {"num_workers": 0}),
        pytest.param("eva", {"num_workers": 1, "persistent_workers": True}, marks=pytest.mark.slow),
    ],
    ids=["the global stream", "a stream of its own", "workers that stay"],
)
def test_no_batch_and_no_random_number_is_used_up(tmp_path, start: str, options: dict[str, Any]):
    models = {}
    for init in (True, start):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Seen()
        own = options and {"generator": torch.Generator().manual_seed(5)}
        loader = DataLoader(Data().loader(1).dataset, batch_size=BATCH, shuffle=True, **options, **own)
        trainer = fit_model(tmp_path, model, lora(init_lora_weights=init), data=(loader, Data().val_dataloader()))
        models[init] = model
        assert float(trainer.callback_metrics["mean"]) == pytest.approx(sum(model.losses) / 3, rel=1e-5)
        assert set(trainer.callback_metrics) == {"mean", "val_loss"}
        assert (len(model.losses), model.logged, trainer.global_step) == (3, 3, 3)
        assert "log" not in vars(model)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, loader, Data().val_dataloader())
    for one, other in zip(models[True].seen, models[start].seen, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:]


@pytest.mark.parametrize(
    ("start", "precision", "dtype", "under_autocast"),
    [("eva", "bf16-true", torch.bfloat16, False), ("lora_ga", "bf16-mixed", torch.float32, True)],
)
def test_batches_before_training_are_run_in_the_precision_of_training_and_go_through_its_hooks(
    tmp_path, precision: Any, dtype: torch.dtype, under_autocast: bool, start: str
):
    ran: dict[bool, set[Any]] = {False: set(), True: set()}

    class Notes(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 100, batch[1]]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert (batch[0] > 50).all()
            ran[self.training].add((batch[0].dtype, torch.is_autocast_enabled("cpu")))
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, lora(init_lora_weights=start), precision=precision)
    trainer.fit(Notes(), Data().train_dataloader(), Data().val_dataloader())
    assert ran[False] == ran[True] == {(dtype, under_autocast)}  # in eval mode before training


@pytest.mark.slow
@pytest.mark.parametrize(("start", "kind"), [("eva", "adapter"), ("lora_ga", "merged")])
def test_resumed_run_keeps_its_factors_and_equals_the_uninterrupted_one(tmp_path, start: str, kind: str):
    whole = trained(tmp_path / "a", Net(), lora(init_lora_weights=start), max_epochs=3)
    torch.manual_seed(0)
    first = make_trainer(tmp_path / "b", lora(init_lora_weights=start, save=kind), max_epochs=2)
    first.fit(Net(), Data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Net()
    fit_model(tmp_path / "c", resumed, lora(init_lora_weights=start), ckpt_path=tmp_path / "half.ckpt", max_epochs=3)
    assert_same_tensors(weights(resumed), weights(whole))
    loaded = load_from_checkpoint(Net, tmp_path / "half.ckpt")
    assert_same_tensors(weights(loaded), weights(first.lightning_module))


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("not called")


class TakesIterator(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        raise AssertionError("not called")


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument in the `training_step`")
@pytest.mark.parametrize(
    ("model", "data"),
    [
        (ByHand, lambda: Data().train_dataloader()),
        (TakesIterator, lambda: Data().train_dataloader()),
        (Net, lambda: iter([(torch.ones(8, FEATURES), torch.zeros(8).long())])),
    ],
    ids=["manual optimization", "dataloader_iter", "iterator"],
)
def test_what_would_use_batches_up_is_refused_with_the_remedy(tmp_path, model: type[Net], data: Any):
    trainer = make_trainer(tmp_path, lora(init_lora_weights="eva"))
    with pytest.raises(LoRAError, match=r"init_lora_weights='eva'.*initialize_from_data.*before fit"):
        trainer.fit(model(), data(), Data().val_dataloader())


class TrainsByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.began = getattr(self, "began", factors(self))
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


@pytest.mark.parametrize(("start", "adopts"), [("eva", True), ("lora_ga", False)])
def test_the_remedy_works_where_batches_would_be_used_up(tmp_path, start: str, adopts: bool):
    """A fit goes on from what initialize_from_data found, and does not ask for data again."""
    model = TrainsByHand()
    config = LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=start)
    inject(model, config)
    initialize_from_data(
        model,
        list(Data().train_dataloader()),
        lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]),
    )
    found = factors(model)
    make_trainer(tmp_path, LoRACallback() if adopts else LoRACallback(config)).fit(model, Data())
    assert_same_tensors(model.began, found)


def test_resumed_run_whose_adapter_is_still_zero_is_not_started_anew(tmp_path):
    first = trained(tmp_path, Net(lr=0.0), lora(init_lora_weights="eva"))
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = AtStart(lr=0.0)
    trainer = make_trainer(tmp_path, lora(init_lora_weights="eva"), max_epochs=2)
    trainer.fit(resumed, Data(batches=2), ckpt_path=tmp_path / "a.ckpt")
    assert_same_tensors(resumed.seen[0], factors(first))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        while True:
            yield torch.randn(FEATURES, generator=generator), int(torch.randint(CLASSES, (), generator=generator))


def test_endless_data_is_read_as_far_as_an_epoch_goes(tmp_path):
    model = Seen()
    trainer = make_trainer(tmp_path, lora(init_lora_weights="eva"), limit_train_batches=4)
    trainer.fit(model, DataLoader(Endless(), batch_size=BATCH), Data().val_dataloader())
    expected = iter(DataLoader(Endless(), batch_size=BATCH))
    assert [torch.equal(batch, next(expected)[0]) for batch, *_ in model.seen] == [True] * 4
    assert model.untrained == 4


# --- several processes ---


def start_on_ranks(path: Path, way: str, start: str) -> None:
    torch.manual_seed(0)
    callback = lora(init_lora_weights=start, target_modules=["0", "2"] if way == "FSDP2" else TARGETS)
    rank, size = dist.get_rank(), dist.get_world_size()
    if way == "FSDP2":
        model: Any = RootSharded()
        callback = lora(init_lora_weights="eva", target_modules="all-linear")
        trainer = model_parallel(path, callback, max_epochs=1, limit_val_batches=0)
    else:
        model, trainer = (
            AtStart(),
            sharded_trainer(path, callback, devices=size, strategy=DDPStrategy(), max_epochs=1, limit_val_batches=0),
        )
    trainer.fit(model, shard_loader(size, rank), shard_loader(size, rank, 6))
    state = {name: value for name, value in whole_state(model).items() if name.endswith("lora_A")}
    assert state
    if start == "lora_ga":  # the mean over the ranks is that of the global batches
        inject(alone := Net(), LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=start))
        initialize_from_data(alone, list(shard_loader())[:8], lambda module, batch: module.training_step(batch, 0))
        for name, value in factors(alone).items():
            torch.testing.assert_close(model.seen[0][name], value, rtol=0, atol=1e-4)
        batches, plain = list(shard_loader())[:8], Net().eval()
        for batch in batches:
            (plain.training_step(batch, 0) / len(batches)).backward()
        values = torch.linalg.svdvals(plain.body[3].weight.grad)
        found = model.get_parameter("body.3.lora_start_B").norm(dim=0)
        torch.testing.assert_close(found, values[2:4] * 8**0.25 / 4, rtol=1e-3, atol=1e-6)
    for name, value in state.items():
        others = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(others, value.contiguous())
        assert all(torch.equal(other, others[0]) for other in others), name


@pytest.mark.slow
@pytest.mark.parametrize(("way", "start"), [("DDP", "eva"), ("FSDP2", "eva"), ("DDP", "lora_ga")])
def test_ranks_start_alike(tmp_path, way: str, start: str):
    world(2).run(start_on_ranks, tmp_path, way, start)


def start_on_uneven_ranks(start: str) -> None:
    batches = list(Data(batches=4 - dist.get_rank()).train_dataloader())
    found = []
    for each in (batches, batches[:3]):
        inject(model := Net(), LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=start))
        initialize_from_data(model, each, lambda module, batch: module.training_step(batch, 0))
        found.append(factors(model))
    assert_same_tensors(*found)


def test_batches_end_on_every_rank_where_one_has_no_more():
    world(2).run(start_on_uneven_ranks, "lora_ga")
