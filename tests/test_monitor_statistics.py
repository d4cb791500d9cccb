"""LoRAMonitor's statistics: which columns loggers get at which steps, with which numbers, and what they leave alone."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_lora.monitor
from lightning_lora import LoRAMonitor, adapter_stats
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.notices import UNTRAINED_NOTICE
from support.runs.training import Data, Net, make_trainer, weights
from support.runs.with_callback import lora

GROUPS = {"body": ["body.0", "body.3"], "head": ["head"]}
OF_GROUP = ("norm", "rank", "grad_A", "grad_B", "cosine")

Rows = dict[int, dict[str, float]]  # columns of lora/ that are filled, by step


def read(path: Path) -> Rows:
    rows = csv.DictReader((path / "metrics.csv").read_text().splitlines())
    filled = ((int(row["step"]), {k: float(v) for k, v in row.items() if v and k.startswith("lora/")}) for row in rows)
    found: Rows = {}
    for step, values in filled:
        if values:
            found.setdefault(step, {}).update(values)
    return found


def fit(path: Path, model: L.LightningModule, *callbacks: L.Callback, resume: Any = None, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(path, *callbacks, **{"logger": CSVLogger(path, name=None, version="")} | options)
    trainer.fit(model, Data(), ckpt_path=resume, **(PLAIN_TYPES_ONLY if resume else {}))
    return trainer


def monitor(every_n_steps: int) -> LoRAMonitor:
    return LoRAMonitor(every_n_steps, plots=False)


class Probe(L.Callback):
    """Keeps the built updates, weights and gradients as they are before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        layers: dict[str, Any] = dict(pl_module.named_modules())
        kept = {}
        for group, names in GROUPS.items():
            of_group = [layers[name] for name in names]
            kept[group] = (
                [layer.lora.spec.scaling * layer.lora_B.double() @ layer.lora_A.double() for layer in of_group],
                [layer.weight.double() for layer in of_group],
                [[getattr(layer, f"lora_{f}").grad.clone() for layer in of_group] for f in "AB"],
            )
        self.steps.append({group: tuple(map(_detached, values)) for group, values in kept.items()})

    def row(self, step: int, before: int | None) -> dict[str, float]:
        """What the loggers should be given after a step, counted from 1, with the last logged one before."""
        row = {}
        for group, (deltas, base, (grad_a, grad_b)) in self.steps[step - 1].items():
            entropies = [torch.distributions.Categorical(torch.linalg.svdvals(d)[:2]).entropy() for d in deltas]
            row |= {
                f"lora/{group}/norm": _norm(deltas) / _norm(base),
                f"lora/{group}/rank": float(torch.stack(entropies).exp().mean()),
                f"lora/{group}/grad_A": _norm(grad_a),
                f"lora/{group}/grad_B": _norm(grad_b),
            }
            if before is not None:
                earlier = self.steps[before - 1][group][0]
                product = sum(float((d * e).sum()) for d, e in zip(deltas, earlier, strict=True))
                row[f"lora/{group}/cosine"] = product / _norm(deltas) / _norm(earlier)
        return row


def _detached(tensors: Any) -> Any:
    return [_detached(t) if isinstance(t, list) else t.detach().clone() for t in tensors]


def _norm(tensors: Any) -> float:
    return math.hypot(*(float(t.norm()) for t in tensors))


def test_csv_columns_have_the_numbers_of_every_nth_step(tmp_path: Path):
    probe, found = Probe(), list[dict[str, float]]()

    class Reads(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            groups = adapter_stats(pl_module).groups
            found.append({f"lora/{g}/{n}": v for g, s in groups.items() for n, v in s.to_dict().items()})

    fit(tmp_path, Net(), lora(), monitor(2), probe, Reads(), max_epochs=3)  # 9 steps, three an epoch
    rows = read(tmp_path)
    assert list(rows) == [1, 3, 5, 7]  # the rows of the 2nd, 4th, ... step, as Lightning numbers them
    for step, before in ((2, None), (4, 2), (6, 4), (8, 6)):
        assert rows[step - 1] == pytest.approx(probe.row(step, before), rel=1e-5)
        without_cosine = {name: value for name, value in rows[step - 1].items() if not name.endswith("cosine")}
        assert without_cosine == found[step - 1]


def test_nothing_is_computed_where_nothing_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("layer_stats", "open_model", "reshard_"):
        monkeypatch.setattr(lightning_lora.monitor, name, None)
    fit(tmp_path / "never", Net(), lora(), monitor(0))
    fit(tmp_path / "later", Net(), lora(), monitor(4))  # an epoch has three steps


class Progress(L.Callback):
    """Notes what callbacks see of ours, in the hook in which others read it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen |= {*trainer.callback_metrics, *trainer.progress_bar_metrics}


def test_training_is_the_same_and_nothing_else_sees_the_statistics(tmp_path: Path):
    progress = Progress()
    trainer = fit(tmp_path / "with", with_stats := Net(), lora(seed=1), monitor(1), progress, max_epochs=2)
    fit(tmp_path / "without", without := Net(), lora(seed=1), max_epochs=2)
    assert {name: tensor.tolist() for name, tensor in weights(with_stats).items()} == {
        name: tensor.tolist() for name, tensor in weights(without).items()
    }
    assert progress.seen == {"val_loss"} == set(trainer.callback_metrics)
    assert list(with_stats.state_dict()) == list(without.state_dict())
    assert [name for name, _ in with_stats.named_modules()] == [name for name, _ in without.named_modules()]
    assert read(tmp_path / "without") == {}


def test_accumulated_batches_are_one_step(tmp_path: Path):
    probe = Probe()
    fit(tmp_path, Net(), lora(), monitor(2), probe, max_epochs=4, accumulate_grad_batches=3)
    assert list(read(tmp_path)) == [1, 3]
    assert len(probe.steps) == 4
    assert read(tmp_path)[3] == pytest.approx(probe.row(4, 2), rel=1e-5)


class TwoOptimizers(Net):
    """One of the body, one of the head; each loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gradients: dict[str, list[float]] = {"body": [], "head": []}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, (group, names) in zip(self.optimizers(), GROUPS.items(), strict=True):
            self.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            layers: dict[str, Any] = dict(self.named_modules())
            self.gradients[group].append(_norm([layers[name].lora_B.grad for name in names]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = [self.body.parameters(), self.head.parameters()]
        return [torch.optim.AdamW([p for p in part if p.requires_grad], lr=0.05) for part in parts]


def test_each_of_several_optimizers_logs_the_layers_that_it_holds_once_a_batch(tmp_path: Path):
    fit(tmp_path, model := TwoOptimizers(), lora(), monitor(2), max_epochs=2)
    rows = read(tmp_path)
    assert list(rows) == [1, 3, 5]
    for group, gradients in model.gradients.items():
        given = [row[f"lora/{group}/grad_B"] for row in rows.values()]
        assert given == pytest.approx(gradients[1::2], rel=1e-6)
    assert [sum(name.endswith("cosine") for name in row) for row in rows.values()] == [0, 2, 2]


def test_a_trial_of_a_few_batches_computes_statistics_though_nothing_is_written(tmp_path: Path, monkeypatch):
    """So that what would fail in the run fails in the trial."""
    calls: list[Any] = []
    compute = lightning_lora.monitor.layer_stats
    monkeypatch.setattr(lightning_lora.monitor, "layer_stats", lambda *args: calls.append(args) or compute(*args))
    fit(tmp_path, Net(), lora(), monitor(1), fast_dev_run=2, log_every_n_steps=50)
    assert len(calls) == 2


class OptimizerOfB(TwoOptimizers):
    """One of every A and one of every B."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        factors = {f: [p for n, p in self.named_parameters() if n.endswith(f"lora_{f}")] for f in "AB"}
        return [torch.optim.SGD(each, lr=0.05) for each in factors.values()]


def test_layers_are_logged_where_a_and_b_are_in_two_optimizers(tmp_path: Path):
    fit(tmp_path, OptimizerOfB(), lora(), monitor(1))
    rows = read(tmp_path)
    assert list(rows) == [0, 1, 2]
    assert all(row[f"lora/{group}/grad_B"] > 0 for row in rows.values() for group in GROUPS)


class Lbfgs(Net):
    """An optimizer that evaluates its closure several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=4)


def test_a_step_with_several_closures_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    compute = lightning_lora.monitor.layer_stats
    monkeypatch.setattr(lightning_lora.monitor, "layer_stats", lambda *args: calls.append(args) or compute(*args))
    fit(tmp_path, Lbfgs(), lora(init_lora_weights=False), monitor(1), probe := Probe())
    assert len(probe.steps) > 3
    assert len(calls) == len(read(tmp_path)) == 3
    assert read(tmp_path)[0]["lora/head/grad_A"] == pytest.approx(_norm(probe.steps[0]["head"][2][0]), rel=1e-6)


@pytest.mark.parametrize("interval", [1, 50])
def test_steps_are_the_monitors_own_whatever_the_trainer_writes_and_each_is_written_once(tmp_path: Path, interval: int):
    fit(tmp_path, Net(), lora(), monitor(3), max_epochs=2, log_every_n_steps=interval)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    ours = [row for row in rows if any(row[name] for name in row if name.startswith("lora/"))]
    assert [int(row["step"]) for row in ours] == [2, 5]
    assert {name for name in ours[0] if ours[0][name]} - {"step", "epoch"} == {
        f"lora/{group}/{name}" for group in GROUPS for name in OF_GROUP[:4]
    }


def test_a_resumed_run_goes_on_with_the_same_numbers_and_begins_cosines_anew(tmp_path: Path):
    fit(tmp_path / "whole", Net(), lora(seed=1), monitor(1), max_epochs=2)
    fit(tmp_path / "first", Net(), lora(seed=1), monitor(1)).save_checkpoint(tmp_path / "1.ckpt")
    fit(tmp_path / "second", Net(), lora(seed=1), monitor(1), resume=tmp_path / "1.ckpt", max_epochs=2)
    whole, second = read(tmp_path / "whole"), read(tmp_path / "second")
    assert list(second) == [3, 4, 5]
    for step, row in second.items():
        expected = {n: v for n, v in whole[step].items() if step > 3 or not n.endswith("cosine")}
        assert row == expected


class Diverges(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1)


def test_a_run_that_diverges_logs_nan_and_goes_on(tmp_path: Path):
    fit(tmp_path, Diverges(), lora(merged_eval=False), monitor(1))
    rows = read(tmp_path)
    assert math.isnan(rows[1]["lora/head/grad_B"])
    assert math.isfinite(rows[1]["lora/head/norm"])
    assert all(math.isnan(rows[2][f"lora/head/{name}"]) for name in OF_GROUP)


class Validates(L.Callback):
    """Runs a Trainer with the same callbacks inside the fit."""

    def __init__(self, path: Path, *callbacks: L.Callback) -> None:
        self.path, self.callbacks = path, callbacks

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        make_trainer(self.path, *self.callbacks).validate(twin := Net(), Data(1), verbose=False)
        assert twin is not pl_module


@UNTRAINED_NOTICE
def test_a_trainer_in_a_hook_leaves_what_the_outer_one_logs(tmp_path: Path):
    callbacks = lora(), monitor(2)
    fit(tmp_path, Net(), *callbacks, Validates(tmp_path / "inner", *callbacks), max_epochs=2)
    assert list(read(tmp_path)) == [1, 3, 5]
    assert all("lora/head/norm" in row for row in read(tmp_path).values())
    assert all("lora/head/cosine" in row for step, row in read(tmp_path).items() if step > 1)
