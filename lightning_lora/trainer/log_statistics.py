"""LoRAMonitor's numbers: adapter_stats of a LightningModule in its loggers, as torchmetrics, at every Nth step.

Until the epoch ends, Lightning writes a logged value again at each step at which it writes, and looks at every logged
value after each batch. So statistics are computed only for steps that Lightning writes, and taken back when they are
written.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import reshard_
from ..metrics import StepStatistic
from ..model.adapted_model import find_model
from ..model.injection import Injection
from ..names import group_names
from ..nn.adapted_weights import AdaptedWeights
from ..report.statistics import Snapshot, layer_stats
from .by_module import ByModule
from .deepspeed_optimizer import is_stepping, with_whole_gradients

MERGE_SECONDS, FIDELITY = "lora/merge_seconds", "lora/fidelity"


@dataclass
class _Run:
    """What is known of one LightningModule in its fit."""

    record: Injection
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    last: tuple[int, list[int]] = (0, [])  # the last step that was logged, and for which optimizers
    metrics: dict[str, StepStatistic] = field(default_factory=dict)  # by name in the loggers
    shown_by: Any = None  # the Trainer that holds what was logged


class StatisticsLog:
    """Log the statistics of LightningModules at each step that is a multiple of `every`; 0 logs nothing."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.runs: ByModule[_Run] = ByModule()

    def begin(self, trainer: Any, module: nn.Module, record: Injection) -> None:
        """Forget what an earlier fit saw, and warn where the Trainer writes to its loggers at other steps."""
        if not self.every:
            return
        self._begin_run(module, record)
        between = trainer.log_every_n_steps
        if trainer.loggers and between and self.every % between and not trainer.fast_dev_run:
            warnings.warn(
                f"LoRAMonitor: every_n_steps={self.every}, but the Trainer writes to its loggers at the steps that "
                f"log_every_n_steps={between} divides; statistics come at those that both divide. Let every_n_steps "
                f"be a multiple of it, or pass Trainer(log_every_n_steps={self.every}).",
                stacklevel=2,
            )

    def _begin_run(self, module: nn.Module, record: Injection) -> _Run:
        record.measures_rounding = True  # in each merge; else the first one alone measures it
        run = self.runs[module] = _Run(record)
        return run

    def log(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """At each Nth step, log the layers that the optimizer is about to change. Collective at such a step.

        An optimizer that evaluates its closure several times calls this several times a step; the first call counts.
        """
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1  # as loggers count
        if step % self.every or not _writes(trainer, step) or not is_stepping(optimizer):
            return
        handle = find_model(module)
        if handle is None:
            return
        run = self.runs.get(module) or self._begin_run(module, handle.record)  # a fit inside this one has ended the run
        done = run.last[1] if run.last[0] == step else []
        if id(optimizer) in done:
            return
        layers = _held_by(optimizer, handle.layers) if len(trainer.optimizers) > 1 else handle.layers
        if not layers:
            return
        run.last = (step, [*done, id(optimizer)])
        reshard_(each for _, each in handle.modules)
        with with_whole_gradients(optimizer):
            stats = layer_stats(layers, run.snapshots, group_names(handle.layers))
        run.snapshots.update(stats.snapshots)
        values = _of_last_merge(handle.record)
        for group, found in stats.groups.items():
            values |= {f"lora/{group}/{name}": value for name, value in found.to_dict().items()}
        for name, value in values.items():
            metric = run.metrics.setdefault(name, StepStatistic())
            metric(value)
            run.shown_by = trainer
            # Lightning wants an attribute's name, and never reads it. As an attribute the metric would be a submodule.
            module.log(name, metric, on_step=True, on_epoch=False, batch_size=1, metric_attribute="lora")

    def take_back(self, trainer: Any, module: nn.Module) -> None:
        """Let Lightning forget what it has written, or it would write it again at its next step."""
        run = self.runs.get(module)
        if run is None or run.shown_by is not trainer:
            return
        for result in trainer.fit_loop._results.values():
            if result.meta.name in run.metrics:
                result.reset()
        for name in run.metrics:
            trainer.callback_metrics.pop(name, None)
        run.shown_by = None

    def end(self, module: nn.Module) -> None:
        """Forget a module whose fit has ended."""
        run = self.runs.pop(module, None)
        if run is not None:
            run.record.measures_rounding = False


def _of_last_merge(record: Injection) -> dict[str, float]:
    """Return what the last evaluation's merge took, by names in the loggers."""
    cost = record.last_merge
    if cost is None:
        return {}
    fidelity = {} if cost.rounding is None else {FIDELITY: cost.rounding}
    return {MERGE_SECONDS: cost.seconds, **fidelity}


def _writes(trainer: Any, step: int) -> bool:
    """Tell whether Lightning writes to loggers after a step."""
    every = trainer.log_every_n_steps
    return bool(trainer.loggers) and (trainer.fast_dev_run or (every > 0 and step % every == 0))


def _held_by(optimizer: torch.optim.Optimizer, layers: Mapping[str, AdaptedWeights]) -> dict[str, AdaptedWeights]:
    """Return the layers of which the optimizer holds a factor."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: layer for name, layer in layers.items() if any(id(factor) in held for factor in layer.factors())}
