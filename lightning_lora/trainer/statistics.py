"""log_stats: adapter_stats of a LightningModule in its loggers, as torchmetrics, at every Nth step.

Lightning gives loggers what was logged last, again and again until the epoch ends, and looks at all of it after every
batch. So statistics are computed only at steps at which it writes, and are taken back when it has written them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import reshard_
from ..metrics import StepStatistic
from ..model.injection import find_injection
from ..model.statistics import Snapshot, layer_stats
from ..names import group_names
from ..nn.adapted_weights import AdaptedWeights, adapted_layers

MERGE_SECONDS, FIDELITY = "lora/merge_seconds", "lora/fidelity"


@dataclass
class _Run:
    """What is known of one LightningModule."""

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    last: tuple[int, list[int]] = (0, [])  # the step that was logged last, and the optimizers that it was logged for
    of_merge: dict[str, float] = field(default_factory=dict)  # of the last evaluation's


class StatisticsLog:
    """Logs the statistics of LightningModules at every step that `every` divides; 0 logs nothing."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.metrics: dict[str, StepStatistic] = {}  # by name in the loggers
        self.runs: dict[nn.Module, _Run] = {}  # by module in a fit, because a hook may run a second Trainer
        self.shown_by: Any = None  # the Trainer that holds what was logged

    def begin(self, trainer: Any, module: nn.Module) -> None:
        """Forget what an earlier fit saw, and warn where the Trainer writes to its loggers at other steps."""
        if not self.every:
            return
        self.runs[module], self.shown_by = _Run(), None
        between = trainer.log_every_n_steps
        if trainer.loggers and between and self.every % between and not trainer.fast_dev_run:
            warnings.warn(
                f"lightning_lora: log_stats={self.every}, but the Trainer writes to its loggers at the steps that "
                f"log_every_n_steps={between} divides; statistics come at those that both divide. Let log_stats be a "
                f"multiple of it, or pass Trainer(log_every_n_steps={self.every}).",
                stacklevel=2,
            )

    def log(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Log the layers that an optimizer is about to change, at an Nth step, once a step. Collective there."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1  # as loggers count
        if step % self.every or not _writes(trainer, step):
            return
        run = self.runs.setdefault(module, _Run())
        done = run.last[1] if run.last[0] == step else []
        adapted = adapted_layers(module)
        layers = _held_by(optimizer, adapted) if len(trainer.optimizers) > 1 else adapted
        if id(optimizer) in done or not layers:  # one that evaluates its closure several times comes several times
            return
        run.last = (step, [*done, id(optimizer)])
        reshard_(module.modules())
        stats = layer_stats(layers, run.snapshots, group_names(adapted))
        run.snapshots.update(stats.snapshots)
        values = dict(run.of_merge)
        for group, found in stats.groups.items():
            values |= {f"lora/{_for_loggers(group)}/{name}": value for name, value in found.to_dict().items()}
        for name, value in values.items():
            if name not in self.metrics:
                self.metrics[name] = StepStatistic()
            metric = self.metrics[name]
            metric(value)
            self.shown_by = trainer
            # The attribute is asked for and not used; as a submodule the metric would change the module.
            module.log(name, metric, on_step=True, on_epoch=False, batch_size=1, metric_attribute="lora")

    def take_back(self, trainer: Any) -> None:
        """Let Lightning forget what it has written: it would write it again at each step of its own."""
        if self.shown_by is not trainer:
            return
        for result in trainer.fit_loop._results.values():
            if result.meta.name in self.metrics:
                result.reset()
        for name in self.metrics:
            trainer.callback_metrics.pop(name, None)
        self.shown_by = None

    def end(self, module: nn.Module) -> None:
        """Forget a module, at the end of its fit."""
        self.runs.pop(module, None)

    @contextmanager
    def watch_merge(self, module: nn.Module) -> Iterator[None]:
        """Note how long the merge inside takes, and what rounding to 16 bits costs in it."""
        injected = find_injection(module)
        if injected is None or module not in self.runs:
            yield
            return
        record, began = injected.record, time.perf_counter()
        record.measures_rounding, record.rounding = True, None
        try:
            yield
        finally:
            record.measures_rounding = False
        of_merge = {MERGE_SECONDS: time.perf_counter() - began}
        if record.rounding is not None:
            of_merge[FIDELITY] = record.rounding
        self.runs[module].of_merge = of_merge


def _writes(trainer: Any, step: int) -> bool:
    """Tell whether Lightning writes to loggers after a step."""
    every = trainer.log_every_n_steps
    return bool(trainer.loggers) and (trainer.fast_dev_run or (every > 0 and step % every == 0))


def _held_by(optimizer: torch.optim.Optimizer, layers: Mapping[str, AdaptedWeights]) -> dict[str, AdaptedWeights]:
    """Return the layers that one of several optimizers holds a factor of."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: layer for name, layer in layers.items() if any(id(factor) in held for factor in layer.factors())}


def _for_loggers(group: str) -> str:
    """Return a group's name in letters that every logger takes; MLflow refuses the asterisk that stands for numbers."""
    return group.replace("*", "N").replace("(the model)", "model")
